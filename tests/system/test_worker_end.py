"""How a worker ends after a signal."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
from contextlib import closing, suppress
from pathlib import Path
from stat import S_ISFIFO

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker, Worker, wait_until
from tests.support.guests import make_guest
from tests.support.system.scheduler import QUEUE, UNACKED, Scheduler
from tests.support.system.systems import send
from tests.system.test_observability import Endpoint

#: Seconds for the exit of a worker whose child has done its last task: far more than it takes.
END_SECONDS = 10.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGQUIT, 0), (signal.SIGINT, 130)])
def test_the_exit_code_names_ctrl_c(
    own_scheduler: Scheduler, start_worker: StartWorker, tmp_path: Path, number: int, code: int
) -> None:
    worker = start_worker(tmp_path, 1)

    os.kill(worker.pid, number)

    assert worker.wait(END_SECONDS) == code


def test_worker_stopped_just_after_it_sent_a_task_to_a_child_exits_when_the_task_is_done(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, fresh: Fresh
) -> None:
    # Given a child that has been sent a fork and has not yet reported that it took it
    directory = fresh("xfs")
    make_guest(directory / "a")
    worker = start_worker(mounts, 1, env={"FORKVM_VISIBILITY_TIMEOUT": "600"})  # it sends no sweep meanwhile
    own_scheduler.fork(directory / "a", directory / "first")  # a child that only starts is given nothing
    own_scheduler.wait_quiet()
    children = worker.children
    send(children, signal.SIGSTOP)
    sent = own_scheduler.send({"source": str(directory / "a"), "destination": str(directory / "b")})
    wait_until(lambda: _unread_bytes(worker) > 0, "a fork in the child's pipe")
    given = _unread_bytes(worker)

    # When the worker gets SIGTERM, and has notified the child that no more tasks follow
    worker.term()
    wait_until(lambda: _unread_bytes(worker) > given, "the stop message to the child")
    send(children, signal.SIGCONT)

    # Then
    assert worker.wait(END_SECONDS) == 0
    assert own_scheduler.wait(sent)["status"] == "succeeded"
    assert own_scheduler.messages()[UNACKED] == 0
    own_scheduler.redis.delete(QUEUE)  # returned by the worker, which did not learn in time that they are done


def test_worker_that_gets_sighup_finishes_its_fork_and_starts_again(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, fresh: Fresh
) -> None:
    # Given a worker with a fork
    directory = fresh("xfs")
    make_guest(directory / "a")
    worker = start_worker(mounts, 1, env={"FORKVM_HTTP": "127.0.0.1:0", "FORKVM_VISIBILITY_TIMEOUT": "600"})
    endpoint = Endpoint(worker)
    own_scheduler.fork(directory / "a", directory / "first")
    own_scheduler.wait_quiet()
    children = worker.children
    send(children, signal.SIGSTOP)
    sent = own_scheduler.send({"source": str(directory / "a"), "destination": str(directory / "b")})
    wait_until(lambda: own_scheduler.messages()[UNACKED] == 1, "the message to be taken")

    # When
    send([worker.pid], signal.SIGHUP)

    # Then it ends as after SIGTERM, and starts again in the same process
    wait_until(lambda: "the worker is ending" in endpoint.get("/readyz")[1], "a worker that ends")
    send(children, signal.SIGCONT)
    assert own_scheduler.wait(sent)["status"] == "succeeded"
    worker.wait_for_output(" ready.", 2)
    own_scheduler.fork(directory / "a", directory / "next")
    assert "CRITICAL" not in worker.output()
    assert "ERROR" not in worker.output()


def _unread_bytes(worker: Worker) -> int:
    """The number of unread bytes in the pipes of a worker's main process."""
    unread = {}
    for number in os.listdir(f"/proc/{worker.pid}/fd"):
        with suppress(OSError):  # closed in the meantime
            path = f"/proc/{worker.pid}/fd/{number}"
            about = os.stat(path)
            if S_ISFIFO(about.st_mode):
                with closing(os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")) as pipe:
                    answer = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
                    unread[about.st_ino] = struct.unpack("i", answer)[0]
    return sum(unread.values())
