"""Only FORKVM_* variables configure the program; variables of other applications and platforms have no effect."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.processes import ROOT, RunForkvm, StartWorker, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_guest
from tests.support.requirements import require
from worker.started_processes import redis_executable

#: Addresses and modules of another application; nothing listens there.
_ELSEWHERE = "redis+socket:///nonexistent/other.sock"
_CELERYS = {
    "CELERY_BROKER_URL": _ELSEWHERE,
    "CELERY_BROKER_READ_URL": _ELSEWHERE,
    "CELERY_BROKER_WRITE_URL": _ELSEWHERE,
    "CELERY_RESULT_BACKEND": _ELSEWHERE,
    "BROKER_URL": _ELSEWHERE,
    "RESULT_BACKEND": _ELSEWHERE,
    "CELERY_BROKER": _ELSEWHERE,
    "CELERY_LOADER": "no.such:Loader",
    "LOADER": "no.such:Loader",
    "CELERY_CONFIG_MODULE": "no_such_config",
    "CONFIG_MODULE": "no_such_config",
    "APP": "no_such_app",
    "CELERY_APP": "no_such_app",
    "DJANGO_SETTINGS_MODULE": "no_such.settings",
    "CELERY_WORKER_QUEUES": "another-queue",
    "CELERY_WORKER_POOL": "solo",
    "CELERY_WORKER_HOSTNAME": "another@host",
    "CELERY_WORKER_LOGLEVEL": "no-such-level",
    "CELERY_WORKER_REVOKES_MAX": "many",
    "C_STRICT_APP": "1",
    "FORKED_BY_MULTIPROCESSING": "1",
    "AUTOSCALE_KEEPALIVE": "long",
    "PICKLE_PROTOCOL": "newest",
}
#: Variables that the celery command reads before it loads an app; no app can override them.
_READ_BEFORE = (
    *("APP", "CELERY_APP", "AUTOSCALE_KEEPALIVE", "PICKLE_PROTOCOL", "CELERY_LOADER", "C_STRICT_APP"),
    "CELERY_WORKER_REVOKES_MAX",
)


def test_commands_and_workers_read_only_their_own_variables(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, tmp_path: Path
) -> None:
    make_guest(tmp_path / "a")
    environment = program_environment(redis_server) | _CELERYS
    worker = start_worker(tmp_path, 1, command="forkvm", env=_CELERYS)

    done = run_forkvm("submit", tmp_path / "a", tmp_path / "b", "--id", "f", "--wait", env=environment)
    checked = run_forkvm("doctor", "--json", env=environment)

    assert done.returncode == 0, done.stderr
    worker.wait_for_output("Task forkvm.fork[f] succeeded")
    assert redis_server.broker_url in checked.stdout
    assert _ELSEWHERE not in checked.stdout
    assert "another@host" not in worker.output()


def test_worker_started_by_celery_reads_only_its_own_variables(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, tmp_path: Path
) -> None:
    make_guest(tmp_path / "a")
    others = {name: value for name, value in _CELERYS.items() if name not in _READ_BEFORE}
    worker = start_worker(tmp_path, 1, command="celery", env=others)

    environment = program_environment(redis_server)
    done = run_forkvm("submit", tmp_path / "a", tmp_path / "b", "--id", "f", "--wait", env=environment)

    assert done.returncode == 0, done.stderr
    worker.wait_for_output("Task forkvm.fork[f] succeeded")


@pytest.fixture
def other_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """The Redis of another application."""
    directory = tmp_path / "other"
    directory.mkdir()
    server = RedisServer(require(redis_executable(), "redis-server", "a second Redis"), directory)
    server.start()
    yield server
    server.stop()


def test_fork_is_not_sent_to_the_redis_of_another_application(
    run_forkvm: RunForkvm, redis_server: RedisServer, other_redis: RedisServer, tmp_path: Path
) -> None:
    environment = program_environment(redis_server)
    others = {name: other_redis.broker_url for name in _CELERYS if name.endswith(("URL", "BACKEND", "BROKER"))}

    done = run_forkvm("submit", tmp_path / "a", tmp_path / "b", "--id", "f", env=environment | others)

    assert done.returncode == 0, done.stderr
    with redis_server.client() as own, other_redis.client() as other:
        assert own.llen("forkvm") == 1
        assert other.keys() == []
        own.delete("forkvm")


def test_unknown_variable_causes_one_warning_by_a_command_and_by_a_worker(
    run_forkvm: RunForkvm, start_worker: StartWorker, tmp_path: Path
) -> None:
    environment = {
        "FORKVM_ROOT": str(tmp_path),
        "FORKVM_SERVICE_HOST": "10.0.0.1",
        "FORKVM_PORT": "tcp://10.0.0.1:80",
        "FORKVM_GUESTS": "/srv",
        "FORKVM_USER": "0:0",
    }
    warning = "forkvm: FORKVM_ROOT is not a setting and is ignored; did you mean FORKVM_ROOTS?"

    done = run_forkvm("gc", tmp_path, env=environment)
    workers = [start_worker(tmp_path, 1, command=command, env=environment) for command in ("forkvm", "celery")]

    assert done.returncode == 0
    assert done.stderr.splitlines() == [warning]
    for worker in workers:
        assert [line for line in worker.output().splitlines() if line.startswith("forkvm: ")] == [warning]


_CALLS = [
    ("submit", "/a", "/b"),
    ("fork", "/a", "/b"),
    ("status", "x"),
    ("files", "x"),
    ("forks", "x"),
    ("cancel", "x"),
    ("campaign", "/a", "--to", "/b-{n}", "--count", "2"),
    ("campaign", "/a", "--to", "/b-{n}", "--count", "2", "--local"),
    ("gc", "/nonexistent"),
    ("verify", "/a", "/b"),
    ("doctor",),
    ("worker",),
]


@pytest.mark.parametrize("call", _CALLS, ids=" ".join)
def test_malformed_url_ends_each_command_with_one_line_and_exit_code_2(
    run_forkvm: RunForkvm, tmp_path: Path, call: tuple[str, ...]
) -> None:
    environment = {"FORKVM_BROKER_URL": "redis://:s3cret/word@h/0", "FORKVM_ROOTS": str(tmp_path)}

    done = run_forkvm(*call, env=environment)

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("forkvm: FORKVM_BROKER_URL: ")
    assert "s3cret" not in line


@pytest.mark.parametrize("url", ["amqp://:s3cret@h", "rediss://:s3cret@h/0?ssl_cert_reqs=none"])
@pytest.mark.parametrize("setting", ["FORKVM_BROKER_URL", "FORKVM_RESULT_BACKEND"])
def test_malformed_url_ends_a_worker_of_celery_with_one_line_and_exit_code_2(
    redis_server: RedisServer, tmp_path: Path, setting: str, url: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "forkvm"],
        cwd=ROOT,
        env=program_environment(redis_server, tmp_path) | {setting: url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"forkvm: {setting}: ")
    assert "s3cret" not in done.stdout + done.stderr


def test_password_comes_from_a_secret_file(
    start_worker: StartWorker, run_forkvm: RunForkvm, redis_server: RedisServer, tmp_path: Path
) -> None:
    # Given a Redis that requires a password, and a URL without one
    make_guest(tmp_path / "a")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "forkvm_redis_password").write_text("Xq9/Wd7@;\n")
    bare = program_environment(redis_server)
    environment = bare | {"FORKVM_SECRETS_DIR": str(tmp_path / "secrets")}
    with redis_server.client() as client:
        client.config_set("requirepass", "Xq9/Wd7@;")
        try:
            # When
            worker = start_worker(tmp_path, 1, env=environment)
            without = run_forkvm("status", "f", env=bare)
            done = run_forkvm("submit", tmp_path / "a", tmp_path / "b", "--wait", "--json", env=environment)

            # Then
            assert without.returncode == 3
            assert json.loads(done.stdout)["status"] == "succeeded"
            wait_until(lambda: "succeeded in" in worker.output(), "the worker's log")
            assert not any(part in worker.output() for part in ("Xq9", "Wd7"))  # temporary names are in lower case

            worker.end()
        finally:
            client.config_set("requirepass", "")
