"""Replacements for the two base images, made from Debian packages: no registry is needed.

The Dockerfile and docker-compose.yml run unchanged. The replacements provide the parts of the real images that are
used: `python` and `pip` in /usr/local/bin; redis-server with an entrypoint that drops root and turns protected mode
off. pip and apt find their packages in files of the replacement, which this machine's own pip and apt downloaded: no
registry is named here, and containers need no network.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.deploy.daemon import Daemon
from tests.fixtures.processes import ROOT

CLIENT = "forkvm-deploy-client"
_RELEASE = "bookworm"
_NOBODY = 65534

_REDIS_ENTRYPOINT = """\
#!/bin/sh
set -e
if [ "$1" = redis-server ]; then
    shift
    chown -R redis:redis .
    exec setpriv --reuid redis --regid redis --clear-groups redis-server --protected-mode no "$@"
fi
exec "$@"
"""

_PYTHON_DOCKERFILE = """\
FROM forkvm-deploy-python
COPY packages /opt/packages
RUN rm -rf /etc/apt/sources.list.d /usr/lib/python3*/EXTERNALLY-MANAGED \\
    && echo 'deb [trusted=yes] file:/opt/packages/apt ./' >/etc/apt/sources.list \\
    && printf '[global]\\nno-index = true\\nfind-links = /opt/packages/pip\\n' >/etc/pip.conf \\
    && ln -s python3.11 /usr/bin/python && ln -s /usr/bin/python3.11 /usr/bin/python /usr/bin/pip /usr/local/bin \\
    && ln -s /usr/bin/python3.11 /usr/local/bin/python3
"""

_CLIENT_DOCKERFILE = "RUN pip install --no-cache-dir 'celery[redis]'\n"


class _Root(NamedTuple):
    """A Debian root filesystem: its name, its packages, and the commands that run in it afterwards."""

    name: str
    packages: tuple[str, ...]
    complete: Callable[[Path], None]


def make_base_images(daemon: Daemon) -> None:
    """Import both replacements under the names in the Dockerfile and docker-compose.yml, and the client's image."""
    python, redis = _names()
    roots = (
        _Root("python", ("python3.11", "python3.11-venv", "python3-pip", "ca-certificates"), lambda root: None),
        _Root("redis", ("redis-server",), _complete_redis),
    )
    python_root, redis_root = [_tarball(root) for root in roots]
    daemon.docker("import", str(python_root), "forkvm-deploy-python")
    redis_settings = ("WORKDIR /data", "VOLUME /data", 'ENTRYPOINT ["docker-entrypoint.sh"]', 'CMD ["redis-server"]')
    daemon.docker("import", *(word for line in redis_settings for word in ("--change", line)), str(redis_root), redis)
    with tempfile.TemporaryDirectory(dir=daemon.directory) as context:
        shutil.copytree(_packages(), Path(context, "packages"))
        _build(daemon, context, _PYTHON_DOCKERFILE, python)
        shutil.rmtree(Path(context, "packages"))
        _build(daemon, context, f"FROM {python}\n{_CLIENT_DOCKERFILE}", CLIENT)


def make_prometheus_image(daemon: Daemon) -> None:
    """Import a replacement under the name in docker-compose.yml, with the user and the directory of the real image."""
    (name,) = re.findall(r"image: (prom/prometheus\S+)", (ROOT / "docker-compose.yml").read_text())
    root = _tarball(_Root("prometheus", ("prometheus",), _complete_prometheus))
    settings = (f"USER {_NOBODY}:{_NOBODY}", "WORKDIR /prometheus", 'ENTRYPOINT ["/usr/bin/prometheus"]')
    daemon.docker("import", *(word for line in settings for word in ("--change", line)), str(root), name)


def make_systemd_image(daemon: Daemon) -> str:
    """Make an image with systemd and the Python of the base image. Returns its name."""
    root = _tarball(_Root("systemd", ("systemd", "systemd-sysv", "python3.11"), lambda root: None))
    daemon.docker("import", str(root), "forkvm-deploy-systemd")
    return "forkvm-deploy-systemd"


def _names() -> tuple[str, str]:
    """The names of the base images, which the replacements get."""
    (python,) = set(re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    (redis,) = re.findall(r"image: (redis\S+)", (ROOT / "docker-compose.yml").read_text())
    return python, redis


def _build(daemon: Daemon, context: str, dockerfile: str, name: str) -> None:
    Path(context, "Dockerfile").write_text(dockerfile)
    daemon.docker("build", "--network", "none", "--tag", name, context)


def _cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The file or directory that `make` creates at the path it is given.

    Kept for the next run, outside the checkout.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forkvm-test-deploy"
    home.mkdir(parents=True, exist_ok=True)
    found = home / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not found.exists():
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=home) as scratch:
            made = Path(scratch, "made")
            make(made)
            made.rename(found)
    return found


def _tarball(root: _Root) -> Path:
    """The root as a tar file."""

    def make(tarball: Path) -> None:
        directory = tarball.with_name("root")
        include = ",".join(root.packages)
        # debootstrap runs in its own namespaces: when it is killed, none of its processes and mounts remain.
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["debootstrap", "--variant=minbase", f"--include={include}", _RELEASE, str(directory)]
        _run([*alone, *command, *_mirror()])
        root.complete(directory)
        shutil.rmtree(directory / "var/cache/apt/archives")
        _run(["tar", "--create", "--numeric-owner", "--file", str(tarball), "--directory", str(directory), "."])

    return _cached(root.name, f"{_RELEASE} {root.packages} {_REDIS_ENTRYPOINT}", make)


def _complete_redis(root: Path) -> None:
    entrypoint = root / "usr/local/bin/docker-entrypoint.sh"
    entrypoint.write_text(_REDIS_ENTRYPOINT)
    entrypoint.chmod(0o755)


def _complete_prometheus(root: Path) -> None:
    directory = root / "prometheus"
    directory.mkdir()
    os.chown(directory, _NOBODY, _NOBODY)


def _mirror() -> list[str]:
    """The mirror in this machine's apt configuration, or else debootstrap's default."""
    answer = _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(COMPONENT)", "Identifier: Packages"])
    sites = [line.split()[0] for line in answer.splitlines() if line.endswith("/debian/ main")]
    return sites[:1]


def _packages() -> Path:
    """The packages that the image builds install: wheels in `pip`, Debian packages with an index in `apt`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = project["project"]
    extras = package["optional-dependencies"]["flower"]
    wanted = [*project["build-system"]["requires"], *package["dependencies"], *extras, "celery[redis]"]
    constraints = ROOT / "constraints.txt"

    def make(directory: Path) -> None:
        wheels = ["--dest", str(directory / "pip"), "--only-binary", ":all:", "--python-version", "3.11"]
        _run([sys.executable, "-m", "pip", "--quiet", "download", *wheels, "--constraint", str(constraints), *wanted])
        (directory / "apt").mkdir()
        _run(["apt-get", "-qq", "download", "tini"], directory / "apt")
        (deb,) = (directory / "apt").iterdir()
        content = deb.read_bytes()
        (directory / "apt/Packages").write_text(
            _run(["dpkg-deb", "--field", str(deb)])
            + f"Filename: ./{deb.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
        )
        directory.chmod(0o755)

    return _cached("packages", f"{wanted} {constraints.read_text()}", make)


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return done.stdout
