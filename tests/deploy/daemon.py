"""A dockerd in its own namespaces: when it ends, no network, firewall rule or mount is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

#: The directory of the filesystem images, and the prefix of the files and control groups of a run, followed by its pid.
_SCRATCH, _PREFIX = Path("/var/tmp"), "forkvm-deploy-"
#: Seconds for dockerd to start answering, and to stop.
_TIMEOUT = 60.0

# Runs as PID 1 of the namespaces. /run is hidden, because containerd and the network namespaces of containers use fixed
# paths in it. dockerd enables IP forwarding in the new network namespace only.
_INSIDE = """
cd "$1"
mount -t tmpfs -o mode=755 tmpfs /run
mount -o loop,discard data.img data
mount -o loop,discard guests.img guests
ip link set lo up
exec tini -- dockerd --data-root "$1/data" --exec-root /run/docker --pidfile /run/docker.pid \
    --host "unix://$1/docker.sock" --storage-driver overlay2 --cgroup-parent "$2" \
    --exec-opt native.cgroupdriver=cgroupfs
"""


class Daemon:
    """A running dockerd.

    `directory` contains its socket and log; `guests` is an XFS, by its path inside and outside.
    """

    def __init__(self, directory: Path, init: int) -> None:
        self.directory = directory
        #: The path of the XFS for `docker run -v` and compose.
        self.guests = directory / "guests"
        #: The same directory as seen by this process, which is in another mount namespace.
        self.guests_seen_here = Path(f"/proc/{init}/root{self.guests}")
        self._init = init
        home = directory / "home"
        home.mkdir()
        #: The user's own docker configuration is not used. Every release has the classic builder.
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "DOCKER_CONFIG": str(home),
            "DOCKER_HOST": f"unix://{directory}/docker.sock",
            "DOCKER_BUILDKIT": "0",
            "COMPOSE_DOCKER_CLI_BUILD": "0",
        }

    def docker(self, *arguments: str, stdin: str | None = None, timeout: float = 600, check: bool = True) -> str:
        """The stdout of `docker ARGUMENTS`; CalledProcessError with its stderr if it fails."""
        return self.run(["docker", *arguments], stdin=stdin, timeout=timeout, check=check)

    def run(
        self,
        command: list[str],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float = 600,
        check: bool = True,
    ) -> str:
        """The stdout of a command that uses this daemon."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | dict(environment or {}),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise CommandFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def kill(self, pid: str) -> None:
        """Send SIGKILL to a process of a container, by the pid that `docker inspect` reports."""
        subprocess.run(["nsenter", "--target", str(self._init), "--pid", "--mount", "kill", "-KILL", pid], check=True)


class CommandFailed(Exception):
    """A command failed. The message contains it and its output."""


@contextlib.contextmanager
def running_daemon() -> Iterator[Daemon]:
    """A new, empty daemon. However this process ends, the daemon and all its containers end with it."""
    _remove_what_killed_runs_left()
    group = f"/{_PREFIX}{os.getpid()}"
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_SCRATCH))
    try:
        _make_filesystem(directory, "data", 24, ["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1"])
        _make_filesystem(directory, "guests", 12, ["mkfs.xfs", "-q", "-m", "reflink=1"])
        with (directory / "dockerd.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("sh", "-euc", _INSIDE, "dockerd", str(directory), group),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # only this test gets Ctrl-C: it stops the daemon in order
            )
        try:
            yield Daemon(directory, _wait_until_it_answers(process, directory))
        finally:
            _end(process)
    finally:
        _remove_groups(group)
        shutil.rmtree(directory)


def _remove_what_killed_runs_left() -> None:
    """Remove the files and empty control groups of killed runs; the kernel ended everything else."""
    for directory in _SCRATCH.glob(f"{_PREFIX}*-*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            _remove_groups(f"/{_PREFIX}{pid}")
            shutil.rmtree(directory)


def _make_filesystem(directory: Path, name: str, gibibytes: int, mkfs: list[str]) -> None:
    """A sparse image, and an empty directory to mount it on."""
    image = directory / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(gibibytes << 30)
    subprocess.run([*mkfs, str(image)], check=True, stdout=subprocess.DEVNULL)
    (directory / name).mkdir()


def _wait_until_it_answers(process: subprocess.Popen[bytes], directory: Path) -> int:
    """The pid of the init process of the namespaces, as soon as the daemon answers."""
    log = directory / "dockerd.log"
    deadline = time.monotonic() + _TIMEOUT
    while True:
        answer = subprocess.run(
            ["docker", "--host", f"unix://{directory}/docker.sock", "version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        init = _child(process.pid)
        if answer.returncode == 0 and init is not None:
            return init
        if process.poll() is not None or time.monotonic() > deadline:
            raise CommandFailed(f"dockerd does not answer; its log:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)


def _child(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to dockerd, which stops its containers. After a timeout, send SIGKILL to the whole namespace."""
    init = _child(process.pid)
    if init is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGTERM)
    try:
        process.wait(_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if init is not None:
        _wait_until_gone(init)


def _wait_until_gone(pid: int) -> None:
    """Wait until all processes have ended.

    The kernel ends a PID namespace after its init, its mounts with its last process.
    """
    deadline = time.monotonic() + _TIMEOUT
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _remove_groups(group: str) -> None:
    """Remove the empty control groups that the containers leave in each hierarchy."""
    for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        for directory, _, _ in os.walk(f"{top}{group}", topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
