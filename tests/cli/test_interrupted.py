"""Ctrl-C ends a command that waits for a queued job; the job continues."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fixtures.processes import RunForkvm, forkvm_script, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer

_SUBMIT = ["submit", "/guests/a", "/guests/b", "--id", "the job", "--wait"]
_CAMPAIGN = ["campaign", "/guests/a", "--to", "/guests/b-{n}", "--count", "2", "--id", "the job", "--wait"]


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [forkvm_script(), *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


#: More reads than a command makes before it waits; while it waits it reads repeatedly.
READS = 5


def reads(server: RedisServer) -> int:
    """How many times any client has read keys. A waiting command does so repeatedly."""
    with server.client() as client:
        return int(client.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"])


@pytest.mark.parametrize(
    "command", [["status", "the job", "--watch"], _SUBMIT, _CAMPAIGN], ids=["status", "submit", "campaign"]
)
def test_ctrl_c_ends_the_wait_and_reports_that_the_job_continues(
    command: list[str], run_forkvm: RunForkvm, redis_server: RedisServer
) -> None:
    # Given a job that no worker takes
    environment = program_environment(redis_server)
    if command[0] == "status":
        assert run_forkvm("submit", "/guests/a", "/guests/b", "--id", "the job", env=environment).returncode == 0
    before = reads(redis_server)
    with started(command, environment) as process:
        wait_until(lambda: reads(redis_server) > before + READS, "a command that waits")

        # When
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)

    # Then
    assert (process.returncode, stdout) == (130, "")
    ended = "forkvm: the job continues; to see it: forkvm status 'the job'\n"
    assert stderr.endswith(ended)
    assert json.loads(run_forkvm("status", "the job", "--json", env=environment).stdout)["state"] == "PENDING"
    with redis_server.client() as client:
        sent = [json.loads(message)["headers"]["id"] for message in client.lrange("forkvm", 0, -1)]
        client.delete("forkvm")
    assert sent == ["the job"]


def test_ctrl_c_at_other_times_exits_with_130_and_no_traceback(
    run_forkvm: RunForkvm, redis_server: RedisServer
) -> None:
    """Ctrl-C while `cancel` waits for the end; the cancellation stays requested."""
    environment = program_environment(redis_server)
    assert run_forkvm("submit", "/guests/a", "/guests/b", "--id", "the job", env=environment).returncode == 0
    with started(["cancel", "the job"], environment) as process:
        with redis_server.client() as client:
            wait_until(lambda: bool(client.exists("forkvm:the job:cancel")), "the request to cancel")
        before = reads(redis_server)
        wait_until(lambda: reads(redis_server) > before + READS, "a command that waits")

        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)

    assert (process.returncode, stdout, stderr.strip()) == (130, "", "")
    with redis_server.client() as client:
        assert client.exists("forkvm:the job:cancel")
        client.delete("forkvm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_end_a_waiting_command_cleanly(number: signal.Signals, redis_server: RedisServer) -> None:
    with started(_SUBMIT, program_environment(redis_server)) as process:
        before = reads(redis_server)
        wait_until(lambda: reads(redis_server) > before + READS, "a command that waits")

        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)

    assert (process.returncode, stdout) == (128 + number, "")
    assert "Traceback" not in stderr
    with redis_server.client() as client:
        client.delete("forkvm")
