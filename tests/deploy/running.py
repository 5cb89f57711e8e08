"""docker-compose.yml with no variable set: forks, faults during a large copy, and the shutdown of a worker."""

from __future__ import annotations

import os
import time
from typing import Any

from tests.deploy.daemon import Daemon
from tests.deploy.report import Report
from tests.deploy.stack import Stack, wait_for

#: Bytes of the large copy.
_LARGE = 2 << 30
_ALL_CPUS = len(os.sched_getaffinity(0))
#: Seconds that docker-compose.yml gives the worker to stop.
_STOP_SECONDS = 60

_MAKE_LARGE = f"""
import os
os.mkdir("/guests/large")
with open("/guests/large/disk.raw", "wb") as file:
    for _ in range({_LARGE >> 20}):
        file.write(os.urandom(1 << 20))
"""
_MAKE_SMALL = """
import os
os.makedirs("/guests/small/snapshots")
for name in ("overlay.raw", "config.json", "snapshots/memory"):
    with open("/guests/small/" + name, "wb") as file:
        file.write(os.urandom(65536))
"""
#: Inode, owner and change time of the fork's directory and file; and the names next to it.
_PRINT_STATE = """
import json, os, sys
def seen(path):
    found = os.stat(path)
    return [found.st_ino, found.st_uid, found.st_mtime_ns, found.st_ctime_ns]
print(json.dumps([seen(sys.argv[1]), seen(sys.argv[1] + "/disk.raw"), sorted(os.listdir("/guests"))]))
"""
#: The messages that wait in a queue (a list), and kombu's records of those that a worker holds.
_COUNT_MESSAGES = """
local found = 0
for _, key in ipairs(redis.call('keys', '*')) do
    local kind = redis.call('type', key).ok
    if kind == 'list' or (kind ~= 'string' and string.find(key, 'unacked')) then found = found + 1 end
end
return found
"""


def check_forks(stack: Stack, report: Report) -> None:
    """A fork by a client that has only Celery, and the state of the worker's processes."""
    with report.check("a client container with only Celery sends a fork and gets its result"):
        stack["worker"].python(_MAKE_SMALL)
        result = stack.fork("small", {"source": "/guests/small", "destination": "/guests/small-fork"})
        assert result["files"]["total"] == 4, result
        stack["worker"].execute("diff", "--recursive", "/guests/small", "/guests/small-fork")

    with report.check("the worker of compose is uid 10001, without capabilities, on a read-only root"):
        worker = stack["worker"]
        status = worker.status()
        assert status["Uid"].split() == ["10001"] * 4, status["Uid"]
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0, status
        assert status["NoNewPrivs"] == "1"
        refused = worker.python("import os\ntry: os.mkdir('/made')\nexcept OSError as error: print(error)", user="0")
        assert "Read-only file system" in refused, refused


def check_pool_size(daemon: Daemon, stack: Stack, report: Report) -> None:
    """The pool size follows the container's CPU limit."""
    with report.check("the pool has as many processes as the container may use CPUs"):
        worker = stack["worker"]
        assert list(stack.client("pools").values()) == [_ALL_CPUS]
        _limit(daemon, stack, 1)
        stack.compose("restart", "worker")
        worker.wait_healthy()
        assert list(stack.client("pools").values()) == [1]
        _limit(daemon, stack, _ALL_CPUS)
        stack.compose("restart", "worker")
        worker.wait_healthy()


def check_faults(daemon: Daemon, stack: Stack, report: Report) -> None:
    """Kill processes and stop the worker while it copies 2 GiB."""
    with report.check("Redis and the worker are killed during a copy of 2 GiB: the fork succeeds once"):
        stack["worker"].python(_MAKE_LARGE)
        request = {"source": "/guests/large", "destination": "/guests/large-fork", "reflink": "never"}
        _limit(daemon, stack, 0.06)  # a copy takes about a minute
        stack.send("large", request)
        _wait_for_copy(stack, "large", 0.1)
        _crash(stack, "redis")
        _wait_for_copy(stack, "large", 0.4)
        _crash(stack, "worker")
        _limit(daemon, stack, _ALL_CPUS)
        result = stack.result("large")
        _assert_done_once(stack, "large", request, result)

    with report.check(f"the worker stops during a copy of 2 GiB within {_STOP_SECONDS} s, and the fork succeeds later"):
        request |= {"destination": "/guests/stopped-fork"}
        _limit(daemon, stack, 0.1)
        stack.send("stopped", request)
        _wait_for_copy(stack, "stopped", 0.1)
        worker = stack["worker"]
        begin = time.monotonic()
        stack.compose("stop", "worker")
        seconds = time.monotonic() - begin
        exit_code = worker.inspect()["State"]["ExitCode"]
        assert (seconds < _STOP_SECONDS, exit_code) == (True, 0), (seconds, exit_code)
        _limit(daemon, stack, _ALL_CPUS)
        stack.compose("start", "worker")
        _assert_done_once(stack, "stopped", request, stack.result("stopped"))


def _limit(daemon: Daemon, stack: Stack, cpus: float) -> None:
    """Limit the worker's container to so many CPUs, immediately and for its next starts."""
    daemon.docker("update", "--cpus", str(cpus), stack["worker"].name)


def _wait_for_copy(stack: Stack, job_id: str, share: float) -> None:
    """Return when `share` of the bytes are copied; AssertionError if the fork has ended before that."""
    found = stack.client("progress", job_id, str(share))
    assert found["state"] == "PROGRESS", f"{job_id} ended before {share:.0%} were seen: {found}"


def _crash(stack: Stack, service: str) -> None:
    """Send SIGKILL to the container; docker starts it again."""
    container = stack[service]
    restarts = container.inspect()["RestartCount"]
    container.kill()
    container.wait_restarted(restarts)


def _assert_done_once(stack: Stack, job_id: str, request: dict[str, Any], result: dict[str, Any]) -> None:
    """The fork equals its source.

    The same id sent again changes nothing. Nothing is left in Redis or beside the fork.
    """
    worker = stack["worker"]
    destination = request["destination"]
    assert result["bytes"]["copied"] == _LARGE, result["bytes"]
    worker.execute("cmp", "/guests/large/disk.raw", f"{destination}/disk.raw")
    before = worker.python(_PRINT_STATE, destination)
    assert ".forkvm-" not in before, before
    stack.send(job_id, request)
    wait_for(lambda: _is_idle(stack), "Redis to hold no message")
    assert stack.result(job_id) == result
    assert worker.python(_PRINT_STATE, destination) == before


def _is_idle(stack: Stack) -> bool:
    """Whether no message waits in a queue or is held by a worker."""
    return int(stack["redis"].execute("redis-cli", "eval", _COUNT_MESSAGES, "0")) == 0
