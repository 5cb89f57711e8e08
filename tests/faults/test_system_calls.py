"""Each system call of a fork fails once: the fork is complete, or fails with the documented code and leaves nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.fork_spec import ForkResult
from tasks.copier.kernel import reflink
from tasks.copier.options import Limits
from tasks.copier.space import reservation
from tests.fixtures.filesystems import Fresh, Kind
from tests.support.engine.forks import CHUNKED, INLINE, MIB, assert_alike, fork, leftovers
from tests.support.engine.traced_processes import Call, TracedChild, calls_of
from tests.support.guests import make_sparse_file
from tests.support.requirements import require_command

#: The errnos, used in turn from call to call. Each way through the engine begins with another one.
ERRORS = ("EIO", "EINTR", "EAGAIN", "EROFS", "ENOMEM", "ENOSPC", "EDQUOT")
NO_SPACE = ("ENOSPC", "EDQUOT")
#: The number of forks under strace at once.
_AT_ONCE = 2
#: The directory of the reservations of one fork.
_RESERVATIONS = "reservations"
#: Not a failure: another process holds the lock. It would fail in each new child, so a chunk would never be free.
_HELD_BY_ANOTHER = (Call("flock", 1), "EAGAIN")


@dataclass(frozen=True)
class Way:
    """One way through the engine: the filesystem, the limits and the options."""

    kind: Kind
    limits: Limits
    options: dict[str, Any]


WAYS = {
    "reflinked": Way("xfs", INLINE, {"durability": "sync"}),
    "copied and verified": Way("ext4", INLINE, {"durability": "sync", "verify": "content"}),
    "written by a child": Way("xfs", CHUNKED, {"durability": "sync", "reflink": "never"}),
}


@pytest.fixture(scope="module")
def strace() -> str:
    return require_command("strace", "the injection of errors")


@pytest.fixture(autouse=True)
def _short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflink, "RETRY_SECONDS", 0.2)


def make_source(source: Path) -> None:
    """A source with one entry of each kind that needs a system call of its own."""
    (source / "below").mkdir(parents=True)
    make_sparse_file(source / "disk.raw", 2 * MIB + 5, MIB + 9)
    (source / "state").write_bytes(b"paused")
    (source / "below" / "config").write_bytes(b"{}")
    (source / "link").symlink_to("state")
    os.link(source / "state", source / "below" / "state")
    os.setxattr(source / "state", "user.origin", b"snapshot-7")
    os.chown(source / "state", 1234, 5678)


@pytest.mark.parametrize("name", WAYS)
def test_a_system_call_that_fails_once_leaves_a_complete_fork_or_none(strace: str, fresh: Fresh, name: str) -> None:
    way = WAYS[name]
    directory = fresh(way.kind)
    make_source(directory / "source")
    (directory / _RESERVATIONS).mkdir()
    whole = TracedChild(strace, directory / "log", lambda: _fork(way, directory))
    whole.begin()
    assert whole.result()["status"] == "succeeded"
    calls = calls_of(whole.trace())
    assert len(calls) > 150

    offset = 3 * list(WAYS).index(name)
    faults = [(call, ERRORS[(n + offset) % len(ERRORS)]) for n, call in enumerate(calls)]
    wrong = list(_wrong(strace, directory, way, [fault for fault in faults if fault != _HELD_BY_ANOTHER]))

    assert not wrong, "\n".join(wrong)


def _wrong(strace: str, directory: Path, way: Way, faults: list[tuple[Call, str]]) -> Iterator[str]:
    """The problems after each fault, in words."""
    for at in range(0, len(faults), _AT_ONCE):
        running = []
        for n, (call, error) in enumerate(faults[at : at + _AT_ONCE]):
            workdir = directory / f"workdir-{n}"
            (workdir / _RESERVATIONS).mkdir(parents=True)
            inject = [f"{call.name}:error={error}:when={call.number}"]
            work = lambda workdir=workdir: _fork(way, directory, workdir)  # noqa: E731
            running.append(
                (call, error, workdir, TracedChild(strace, workdir / "log", work, calls=call.name, inject=inject))
            )
        for *_, traced in running:
            traced.begin()
        for call, error, workdir, traced in running:
            try:
                complaint = _complaint(traced.result(), directory / "source", workdir, call, error)
            except AssertionError as raised:
                complaint = str(raised)
            if complaint:
                yield f"{call.name}, number {call.number}, {error}: {complaint}"
            shutil.rmtree(workdir)


def _fork(way: Way, directory: Path, workdir: Path | None = None) -> ForkResult:
    destination = (workdir or directory) / "fork"
    # In the child only. A fork opens the reservations of all others of this host, so their number would decide which
    # call fails: the close of a pipe may be none of them (`calls_of`).
    reservation.DIRECTORY = str(destination.parent / _RESERVATIONS)
    # One child: with two, it is not known which of them makes the nth call.
    return fork(directory / "source", destination, limits=way.limits, processes=1, **way.options)


def _complaint(result: ForkResult, source: Path, workdir: Path, call: Call, error: str) -> str:
    published = (workdir / "fork").exists()
    if published != (result["status"] == "succeeded"):
        return f"it {result['status']}, and the destination is {'' if published else 'not '}there"
    if published:
        assert_alike(source, workdir / "fork")
    if leftovers(workdir):
        return f"left: {leftovers(workdir)}"
    failure = result["error"]
    if failure is not None:
        expected = ("no_space" if error in NO_SPACE else "io_error", getattr(errno, error))
        if (failure["code"], failure["errno"]) != expected or "unexpected" in failure["message"]:
            return str(failure)
    return ""
