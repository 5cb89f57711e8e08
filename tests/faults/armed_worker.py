"""Loaded into a worker (`celery worker -I tests.faults.armed_worker`): its children stop or die at the moments armed.

The program runs as it is. A few of its functions are called through others, which first look whether their moment is
armed for this fork (`tests.faults.fault_points`).
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

#: Of the arguments of a function: the fork's id and the moment, or None.
Moment = Callable[..., tuple[str, str] | None]

_DIRECTORY = directory_of(os.environ["FORKVM_BROKER_URL"])


def _reach(moment: tuple[str, str] | None) -> None:
    if moment is None:
        return
    armed = _DIRECTORY / "@".join(moment)
    try:
        action = armed.read_text()
        if action != "poison":
            armed.unlink()
    except FileNotFoundError:  # not armed, or another one came first
        return
    Path(f"{armed}={os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)


def _strike(owner: Any, name: str, before: Moment | None = None, after: Moment | None = None) -> None:
    original = getattr(owner, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            _reach(before(*args))
        done = original(*args, **kwargs)
        if after is not None:
            _reach(after(*args))
        return done

    setattr(owner, name, armed)


def _at(moment: str) -> Moment:
    """The moment of a function whose first argument is a Staging, or has one."""

    def of(first: Any, *rest: Any) -> tuple[str, str] | None:
        staging = next((value for value in (first, *rest) if isinstance(value, Staging)), None) or first.staging
        journal = staging.journal()
        return None if journal is None else (journal.spec["fork_id"], moment)

    return of


def _at_chunk(work: Any, plan: Any, piece: Any, *rest: Any) -> tuple[str, str] | None:
    number, last = plan.chunks.index(piece), len(plan.chunks) - 1
    names = {last // 2: "middle", last: "last chunk", 0: "first chunk"}
    return _at(names[number])(work) if number in names else None


with suppress(FileExistsError):
    _DIRECTORY.mkdir()
# A planner does chunks beside its walk, as many as time allows; here each is a task, so that each has its moment.
setattr(tasks.fork.start, "EarlyChunks", lambda work, ticker: None)  # noqa: B010
_strike(Staging, "begin", before=lambda staging, spec, earlier: (spec["fork_id"], "begin uncounted"))
_strike(Staging, "make_tree", before=_at("no tree"))
_strike(lifecycle, "make_plan", before=_at("plan"))
_strike(lifecycle, "run_chunk", before=_at(INLINE))
_strike(chunk, "run_chunk", before=_at_chunk)
_strike(tasks.fork.finish, "finish", before=_at("finish uncounted"))
_strike(lifecycle, "close_tree", before=_at("finish"))
_strike(Staging, "publish", before=_at("before the rename"), after=_at("after the rename"))
_strike(FinalResults, "store", after=lambda results, job_id, result: (job_id, "settled"))
