"""One Redis and one worker for all tests of a module, and a check of what each test leaves."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from celery import Celery

from tests.fixtures.filesystems import fresh_directory
from tests.fixtures.processes import ROOT, StartWorker, Worker, forkvm_script, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import MIB, make_sparse_file
from tests.support.outcome import LOGS, body_passed
from tests.support.requirements import require
from tests.support.system.scheduler import QUEUES, Scheduler
from tests.support.system.systems import SMALL_LIMITS, StartSystem, System
from worker.started_processes import redis_executable


@pytest.fixture(scope="module")
def module_worker(
    mounts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[RedisServer, Worker]]:
    """A Redis and a worker with two children; its one root is the directory in which all filesystems are mounted.

    Its limits are SMALL_LIMITS, or the module's LIMITS.
    """
    executable = require(redis_executable(), "redis-server", "the tests that run on Redis")
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="forkvm-redis-"))
        stack.callback(shutil.rmtree, directory)
        server = RedisServer(executable, directory)
        stack.callback(server.kill)
        server.start()
        log = tmp_path_factory.mktemp("worker") / "worker.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [forkvm_script(), "worker", "--concurrency", "2"],
                cwd=ROOT,
                env=program_environment(server, mounts) | getattr(request.module, "LIMITS", SMALL_LIMITS),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        worker = Worker(process, log)
        stack.callback(worker.end)
        worker.wait_until_ready()
        yield server, worker


@pytest.fixture
def system(module_worker: tuple[RedisServer, Worker], request: pytest.FixtureRequest) -> Iterator[System]:
    """The module's system. A test that passed but left a message or a key without a TTL fails afterwards."""
    server, worker = module_worker
    request.node.stash[LOGS].append(worker.log)
    assert worker.running, "an earlier test ended the worker"
    begin = len(worker.output())
    app = Celery("scheduler", broker=server.broker_url, backend=server.backend_url, set_as_current=False)
    scheduler = Scheduler(app, server)
    try:
        yield System(server, worker, scheduler)
        if body_passed(request.node):
            scheduler.wait_quiet()
            leaked = server.leaked_keys()
            assert not leaked, f"left in Redis without a TTL, or not in the table of keys: {', '.join(leaked)}"
            assert "Logging error" not in worker.output()[begin:]
        else:  # so that the keys of a failed test do not fail the next one
            scheduler.redis.delete(*QUEUES)
    finally:
        scheduler.close()
        app.close()


@pytest.fixture
def scheduler(system: System) -> Scheduler:
    return system.scheduler


@pytest.fixture
def start_system(own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path) -> StartSystem:
    """Start a system for one test, which may harm it; further workers come from `start_worker`."""

    def start(env: Mapping[str, str] | None = None, *, concurrency: int = 2) -> System:
        worker = start_worker(mounts, concurrency, env=SMALL_LIMITS | dict(env or {}))
        return System(own_scheduler.server, worker, own_scheduler)

    return start


#: The number of small files in `large_source`.
LARGE_FILES = 4_000


@pytest.fixture(scope="session")
def large_source(xfs_noreflink: Path) -> Iterator[Path]:
    """A directory whose fork, where nothing can be reflinked, takes a hundred chunks and most of a second.

    Many small files are much work and few bytes.
    """
    with fresh_directory(xfs_noreflink) as parent:
        source = parent / "source"
        source.mkdir()
        make_sparse_file(source / "disk.raw", 64 * MIB, 32 * MIB, seed=7)
        for directory in range(LARGE_FILES // 100):
            layer = source / f"layer-{directory}"
            layer.mkdir()
            for n in range(100):
                (layer / f"block-{n}").write_bytes(b"%d/%d" % (directory, n) * 500)
        yield source


@pytest.fixture
def workdir(large_source: Path) -> Iterator[Path]:
    """An empty directory on the filesystem of `large_source`. It is removed even while a worker writes to it."""
    directory = Path(tempfile.mkdtemp(dir=large_source.parent))
    yield directory

    def removed() -> bool:
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    wait_until(removed, "the removal of the test's directory")
