"""The URLs of Redis in the settings: parsing and validation.

kombu (the broker) and Celery (the result backend) parse URLs differently. An option of the URL can disable the checks
of TLS in one of them, and is taken for a database in the other. An unknown option causes a traceback that shows the
password. So a URL is parsed here once, and both get a URL made from the result. Error texts never contain the URL.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

TCP: Final = "redis"
TLS: Final = "rediss"
SOCKET: Final = "redis+socket"
SENTINEL: Final = "sentinel"
_SCHEMES = (TCP, TLS, SOCKET, SENTINEL)
_PORTS = {TCP: 6379, TLS: 6379, SENTINEL: 26379}
#: Options of a `rediss://` URL that name a file (redis-py's names).
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
#: Options of a `rediss://` URL that must have one of these values: the checks of TLS cannot be disabled.
_TLS_CHECKS = {"ssl_cert_reqs": ("required", "cert_required"), "ssl_check_hostname": ("true", "1", "yes")}
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}")
#: Redis has 16 databases by default; a longer number is a mistake.
_DATABASE = re.compile(r"[0-9]{1,6}")
_PORT = re.compile(r"[0-9]{1,5}")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPES = "write special characters of a user name or password as %XX (/ is %2F, @ is %40, ; is %3B)"


@dataclass(frozen=True)
class RedisUrl:
    """The parts of a URL: one Redis, or the sentinels that watch it."""

    scheme: str
    #: Host and port of the server, or of each sentinel; none with a unix socket.
    hosts: tuple[tuple[str, int], ...]
    #: The unix socket's path, or "".
    path: str
    username: str
    password: str
    database: int
    #: Name of the master at the sentinels, or "".
    master: str
    #: Files for TLS, as pairs of redis-py's option and the path.
    tls_files: tuple[tuple[str, str], ...]

    @property
    def is_tls(self) -> bool:
        """Whether the connection is over TLS."""
        return self.scheme == TLS

    def render(self, password: str = "") -> str:
        """The URL for kombu and Celery, without options that only the code here reads.

        `password` is used where the URL has none.
        """
        secret = quote(self.password or password, safe="")
        user = f"{quote(self.username, safe='')}:{secret}@" if self.username or secret else ""
        if self.path:
            return f"{self.scheme}://{user}{quote(self.path)}?virtual_host={self.database}"
        hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return ";".join(f"{self.scheme}://{user}{host}/{self.database}" for host in hosts)

    def shown(self) -> str:
        """The URL for messages: without user name, password and options."""
        if self.path:
            return f"{self.scheme}://{self.path}"
        hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return ";".join(f"{self.scheme}://{host}/{self.database}" for host in hosts)


def read_redis_url(url: str) -> RedisUrl:
    """Parse a URL. Raises ValueError, whose text never contains a part of the URL."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"it contains blanks, control characters or non-ASCII characters; {_ESCAPES}")
    if "://" not in url:
        raise ValueError(f"it has no scheme; put one of {_listed()} before ://")
    urls = url.split(";")
    if len(urls) == 1:
        return _read_one(url)
    if not all(one.startswith(f"{SENTINEL}://") for one in urls):
        raise ValueError(f"a list with ; is for sentinels only, each as sentinel://host:port; {_ESCAPES}")
    return _joined([_read_one(one) for one in urls])


def _joined(sentinels: list[RedisUrl]) -> RedisUrl:
    """One URL of several sentinels. A part that only some of them have holds for all; no part may differ."""
    first = sentinels[0]
    for name in ("username", "password", "database", "master"):
        given = {value for value in (getattr(one, name) for one in sentinels) if value}
        if len(given) > 1:
            raise ValueError(f"the sentinels differ in the {name}")
        if given:
            first = RedisUrl(**{**vars(first), name: given.pop()})
    return RedisUrl(**{**vars(first), "hosts": tuple(host for one in sentinels for host in one.hosts)})


def _read_one(url: str) -> RedisUrl:
    scheme, _, rest = url.partition("://")
    if scheme in ("unix", "redis+unix"):
        raise ValueError(f"write a unix socket as {SOCKET}:///path/of/redis.sock")
    if scheme not in _SCHEMES:
        raise ValueError(f"the scheme must be one of {_listed()}")
    if "#" in rest:
        raise ValueError(f"it contains a #; {_ESCAPES}")
    place, _, query = rest.partition("?")
    authority, slash, path = place.partition("/")
    if "@" in path or "@" in query:
        raise ValueError(f"an @ follows a / or ?; {_ESCAPES}")
    user, _, server = authority.rpartition("@")
    username, _, password = user.partition(":")
    if "@" in user:
        raise ValueError(f"it has more than one @; {_ESCAPES}")
    options = _options(query)
    if scheme == SOCKET:
        if server or not path:
            raise ValueError(f"write a unix socket as {SOCKET}:///path/of/redis.sock")
        hosts: tuple[tuple[str, int], ...] = ()
        database = options.pop("virtual_host", "")
        username, password = (options.pop(*one) for one in (("username", username), ("password", password)))
    else:
        hosts = (_host(server, _PORTS[scheme]),)
        database = _decoded(path)
    master = options.pop("master_name", "") if scheme == SENTINEL else ""
    files = _tls_files(options) if scheme == TLS else ()
    if options:
        raise ValueError(f"an option after the ? is not supported; supported: {_supported(scheme)}")
    socket = _decoded(slash + path) if scheme == SOCKET else ""
    return RedisUrl(scheme, hosts, socket, _decoded(username), _decoded(password), _database(database), master, files)


def _host(server: str, port: int) -> tuple[str, int]:
    """Host and port out of `host`, `host:port`, `[address]` or `[address]:port`."""
    if server.startswith("["):
        host, closed, behind = server[1:].partition("]")
        try:
            ipaddress.IPv6Address(unquote(host))
        except ValueError:
            closed = ""
        if not closed or (behind and not behind.startswith(":")):
            raise ValueError("write an IPv6 address in brackets: [::1]:6379")
        host, number = unquote(host), behind[1:]
    else:
        host, _, number = server.partition(":")
        if ":" in number:
            raise ValueError(f"host and port have more than one :; write an IPv6 address in brackets, and {_ESCAPES}")
        if not host:
            raise ValueError("the host is missing")
        if not _HOST.fullmatch(host):
            raise ValueError(f"the host is not a valid host name; {_ESCAPES}")
    if number and not (_PORT.fullmatch(number) and 0 < int(number) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    return host, int(number) if number else port


def _database(text: str) -> int:
    if text and not _DATABASE.fullmatch(text):
        raise ValueError(f"the database, after the host, must be a number; {_ESCAPES}")
    return int(text or 0)


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        if name in options:
            raise ValueError("an option after the ? is repeated")
        options[name] = _decoded(value)
    return options


def _tls_files(options: dict[str, str]) -> tuple[tuple[str, str], ...]:
    for name, allowed in _TLS_CHECKS.items():
        if options.pop(name, allowed[0]).lower() not in allowed:
            raise ValueError(
                f"{name} must not disable a check of TLS; "
                "to trust your own authority, set FORKVM_REDIS_CA to its certificate file"
            )
    return tuple((name, options.pop(name)) for name in _TLS_FILES if name in options)


def _decoded(text: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise ValueError("write a % that does not start %XX as %25")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("its %XX escapes are not UTF-8") from None


def _supported(scheme: str) -> str:
    options = {
        TLS: (*_TLS_FILES, *_TLS_CHECKS),
        SOCKET: ("virtual_host", "username", "password"),
        SENTINEL: ("master_name",),
    }
    return ", ".join(options.get(scheme, ())) or "none"


def _listed() -> str:
    return ", ".join(_SCHEMES)
