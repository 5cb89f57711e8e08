"""Loaded into a worker (`include` of `start_worker`): its children stop or are killed at armed points.

The program itself is unchanged. Wrappers around a few of its functions first check whether a fault is armed for this
fork at this point (`tests.faults.fault_points`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tasks.fork.finish
import tasks.fork.start
from tasks.copier.fork import chunk, lifecycle
from tasks.copier.staging.staging import Staging
from tasks.store.final_results import FinalResults
from tests.faults.fault_points import INLINE, directory_of

#: Takes the arguments of a wrapped function and returns the fork's id and the point, or None.
PointOf = Callable[..., tuple[str, str] | None]

_DIRECTORY = directory_of(os.environ["FORKVM_BROKER_URL"])


def _act_at(point: tuple[str, str] | None) -> None:
    if point is None:
        return
    armed = _DIRECTORY / "@".join(point)
    try:
        action = armed.read_text()
        if action != "poison":
            armed.unlink()
    except FileNotFoundError:  # not armed, or another process took it first
        return
    Path(f"{armed}={os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)


def _arm(owner: Any, name: str, before: PointOf | None = None, after: PointOf | None = None) -> None:
    original = getattr(owner, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            _act_at(before(*args))
        done = original(*args, **kwargs)
        if after is not None:
            _act_at(after(*args))
        return done

    setattr(owner, name, armed)


def _at(point: str) -> PointOf:
    """For a function whose first argument is a Staging or has one: the fork's id and `point`."""

    def of(first: Any, *rest: Any) -> tuple[str, str] | None:
        staging = next((value for value in (first, *rest) if isinstance(value, Staging)), None) or first.staging
        journal = staging.journal()
        return None if journal is None else (journal.spec["fork_id"], point)

    return of


def _at_chunk(work: Any, plan: Any, piece: Any, *rest: Any) -> tuple[str, str] | None:
    number, last = plan.chunks.index(piece), len(plan.chunks) - 1
    names = {last // 2: "middle", last: "last chunk", 0: "first chunk"}
    return _at(names[number])(work) if number in names else None


with suppress(FileExistsError):
    _DIRECTORY.mkdir()
# A planner would clone chunks during its walk. Without that, each chunk is a task, and its point is reached.
setattr(tasks.fork.start, "EarlyChunks", lambda work, ticker: None)  # noqa: B010
_arm(Staging, "begin", before=lambda staging, spec, earlier: (spec["fork_id"], "begin uncounted"))
_arm(Staging, "make_tree", before=_at("no tree"))
_arm(lifecycle, "make_plan", before=_at("plan"))
_arm(lifecycle, "run_chunk", before=_at(INLINE))
_arm(chunk, "run_chunk", before=_at_chunk)
_arm(tasks.fork.finish, "finish", before=_at("finish uncounted"))
_arm(lifecycle, "close_tree", before=_at("finish"))
_arm(Staging, "publish", before=_at("before the rename"), after=_at("after the rename"))
_arm(FinalResults, "store_all", after=lambda results, stored: (next(iter(stored)), "result stored"))
