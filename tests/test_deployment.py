"""docker-compose.yml and the Dockerfile, as far as a machine without images can check them.

The exact command and health check of each service are run here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from celery import Celery

from tests.fixtures.processes import ROOT, PublicProgram, end_group, forkvm_script, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_guest
from tests.support.outcome import LOGS
from tests.support.requirements import require, require_command
from worker.started_processes import redis_executable

Compose = Callable[..., dict[str, Any]]


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """Evaluate docker-compose.yml like docker with the given variables set, and no others."""
    command = require_command("docker-compose", "the check of docker-compose.yml")

    def read(**variables: str) -> dict[str, Any]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | variables
        done = subprocess.run(
            [command, "--file", str(ROOT / "docker-compose.yml"), "config"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        # The output is a compose file again, in which a dollar sign is still written twice.
        project: dict[str, Any] = yaml.safe_load(done.stdout.replace("$$", "$"))
        return project

    return read


def test_compose_starts_a_worker_after_its_redis_with_no_variable_set(compose: Compose) -> None:
    services = compose()["services"]

    assert {name for name, service in services.items() if "profiles" not in service} == {"redis", "worker"}
    assert services["worker"]["depends_on"]["redis"]["condition"] == "service_healthy"
    for variable in ("FORKVM_BROKER_URL", "FORKVM_RESULT_BACKEND"):
        assert services["worker"]["environment"][variable].startswith("redis://redis:6379/")


def test_all_guests_are_in_one_mount_and_it_is_the_workers_root(compose: Compose) -> None:
    project = compose()

    ((source, target),) = _mounts(project["services"]["worker"])

    assert source in project["volumes"]  # so that docker gives it the owner that /guests has in the image
    assert target == project["services"]["worker"]["environment"]["FORKVM_ROOTS"]


def test_guests_of_the_host_are_mounted_on_request_and_the_worker_runs_as_their_owner(compose: Compose) -> None:
    worker = compose(FORKVM_GUESTS="/srv/guests", FORKVM_USER="1000:1001")["services"]["worker"]

    assert _mounts(worker) == [("/srv/guests", "/guests")]
    assert worker["user"] == "1000:1001"


def test_pool_size_and_node_name_are_passed_on_and_empty_if_unset(compose: Compose) -> None:
    unset = compose()["services"]["worker"]["environment"]
    given = compose(FORKVM_CONCURRENCY="3", FORKVM_NAME="rack-7")["services"]["worker"]["environment"]

    assert (unset["FORKVM_CONCURRENCY"], unset["FORKVM_NAME"]) == ("", "")
    assert (given["FORKVM_CONCURRENCY"], given["FORKVM_NAME"]) == ("3", "rack-7")


def test_worker_service_has_no_more_rights_than_security_md_names(compose: Compose) -> None:
    worker = compose()["services"]["worker"]
    security = (ROOT / "SECURITY.md").read_text()
    (ambient,) = re.findall(r"^AmbientCapabilities=(.+)$", security, re.MULTILINE)

    assert worker["read_only"] is True
    assert worker["cap_drop"] == ["ALL"]
    assert {f"CAP_{name}" for name in worker["cap_add"]} <= set(ambient.split())
    assert worker["security_opt"] == ["no-new-privileges:true"]


def test_redis_service_keeps_jobs_and_its_health_check_works(
    compose: Compose, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    service = compose()["services"]["redis"]
    server = require(redis_executable(), "redis-server", "the redis service")
    # The service's port may be in use here; that is the only change.
    port = str(_free_port())
    assert service["command"][0] == "redis-server"
    assert service["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]
    command = [server, *service["command"][1:], "--port", port]
    client = shutil.which("redis-cli") or str(Path(server).parent / "redis-cli")

    def healthy() -> bool:
        return subprocess.run([client, "-p", port, "ping"], capture_output=True).returncode == 0

    with _running(command, tmp_path, request) as process:
        wait_until(healthy, "redis-cli ping")
        with redis.Redis(port=int(port), decode_responses=True) as connection:
            assert connection.config_get("appendonly") == {"appendonly": "yes"}
            assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            connection.set("job", "accepted")
        process.kill()
        process.wait()
        assert not healthy()

    with _running(command, tmp_path, request):
        wait_until(healthy, "redis-cli ping")
        with redis.Redis(port=int(port), decode_responses=True) as connection:
            assert connection.get("job") == "accepted"


def test_worker_service_forks_and_its_health_check_fails_when_it_no_longer_consumes(
    compose: Compose,
    tmp_path: Path,
    redis_server: RedisServer,
    foreign_client: Celery,
    request: pytest.FixtureRequest,
) -> None:
    # Given the service's command, user and environment, with only its addresses and paths changed.
    service = compose()["services"]["worker"]
    guests = redis_server.socket.parent / "guests"  # every user may enter it, unlike tmp_path
    make_guest(guests / "a")
    heartbeat = guests / "heartbeat"
    environment = service["environment"] | {
        "FORKVM_BROKER_URL": redis_server.broker_url,
        "FORKVM_RESULT_BACKEND": redis_server.backend_url,
        "FORKVM_ROOTS": str(guests),
        "FORKVM_HEARTBEAT_FILE": str(heartbeat),
        "PATH": os.environ["PATH"],
    }
    name, *arguments = service.get("command") or _command_of_the_image()
    assert name == "forkvm"
    command, user = [forkvm_script()], None
    if os.geteuid() == 0:
        program: PublicProgram = request.getfixturevalue("public_program")
        command, user = program.command, int(service["user"].partition(":")[0])
        environment |= program.environment
        for path in (guests, *guests.rglob("*")):
            os.chown(path, user, user)

    def healthy() -> bool:
        kind, script = service["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        return subprocess.run(["/bin/sh", "-c", script], env=environment, capture_output=True).returncode == 0

    assert not healthy()

    with _running([*command, *arguments], Path("/"), request, environment, user) as process:
        # When it runs, then it is healthy and works.
        wait_until(healthy, "the worker's health check")
        fork = foreign_client.send_task(
            "forkvm.fork",
            kwargs={"request": {"source": str(guests / "a"), "destination": str(guests / "b")}},
            task_id="fork-of-a-service",
            queue="forkvm",
        )
        assert fork.get(timeout=30)["status"] == "succeeded"
        assert (guests / "b" / "overlay.raw").is_file()

        # When it hangs for longer than the check allows, then it is unhealthy; when it continues, it is healthy again.
        os.killpg(process.pid, signal.SIGSTOP)
        long_ago = time.time() - 60
        os.utime(heartbeat, (long_ago, long_ago))
        assert not healthy()
        os.killpg(process.pid, signal.SIGCONT)
        wait_until(healthy, "the worker's health check after it hung")

        # When docker stops it, then it exits by itself within docker's timeout.
        process.terminate()
        assert process.wait(_seconds(service["stop_grace_period"])) == 0


def test_image_copies_only_existing_files_and_does_not_run_as_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    # Files that a stage copies from another stage are not in the build context.
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from=" not in line]
    copied = {source for sources in copies for source in sources}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]

    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)
    assert user == "10001:10001"
    assert lines.index("USER 10001:10001") > max(n for n, line in enumerate(lines) if line.startswith("RUN "))
    assert _command_of_the_image() == ["forkvm", "worker"]


def _command_of_the_image() -> list[str]:
    (command,) = re.findall(r"^CMD (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    words: list[str] = json.loads(command)
    return words


def _mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """(source, target) of each mount, in the short form of older releases of docker-compose and in the long form."""
    mounts = []
    for volume in service["volumes"]:
        if isinstance(volume, str):
            source, target, *_ = volume.split(":")
            mounts.append((source, target))
        else:
            mounts.append((volume["source"], volume["target"]))
    return mounts


def _seconds(duration: str) -> int:
    """The seconds of a duration as compose prints it: "60s", or from newer releases "1m0s"."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _running(
    command: list[str],
    directory: Path,
    request: pytest.FixtureRequest,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a service, in a process group that ends with the block."""
    log: Path = request.getfixturevalue("tmp_path") / f"{Path(command[0]).name}.log"
    request.node.stash[LOGS].append(log)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    try:
        yield process
    finally:
        end_group(process)
