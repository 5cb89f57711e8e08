"""TLS to Redis: a `rediss://` URL is verified, certificate and host name, and what fails that is refused."""

from __future__ import annotations

import ssl
import sys
from typing import Any, NoReturn

from celery import Celery
from kombu.exceptions import OperationalError

#: Exit code of what finds no broker that it may talk to.
NO_BROKER = 3


def is_tls(url: str) -> bool:
    """Whether a Redis URL asks for TLS."""
    return url.startswith("rediss://")


def tls_options(ca: str) -> dict[str, Any]:
    """What redis-py is told for a connection over TLS; `ca` is a file of trusted authorities, "" for the system's."""
    options: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    return options | {"ssl_ca_certs": ca} if ca else options


def is_untrusted(error: BaseException | None) -> bool:
    """Whether a connection failed because the server's certificate is not to be trusted, or is another host's."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def refuse_untrusted(app: Celery, url: str) -> None:
    """End a worker whose broker is not to be trusted: unlike one that is away, it will not mend itself."""
    if not is_tls(url):
        return
    try:
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
    except (OperationalError, OSError) as error:
        if is_untrusted(error):
            _refuse(f"the broker at {without_password(url)} is not to be trusted: {error}")


def without_password(url: str) -> str:
    """A URL that may be shown; a password may stand before the host or among what follows a question mark."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    if "@" in query:  # part of a password, before or behind the host
        return f"{scheme}://..."
    return f"{scheme}://{place.rpartition('@')[2]}"


def _refuse(message: str) -> NoReturn:
    print(f"forkvm: {message}", file=sys.stderr)
    sys.exit(NO_BROKER)
