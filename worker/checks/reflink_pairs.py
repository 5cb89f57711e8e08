"""The check whether files can be reflinked from each root to each other one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import NamedTuple

from tasks.copier.errors import ForkError
from tasks.copier.staging.self_test import probe_pair
from worker.checks.check import Check, text_of

_FIX = "keep a source and its forks on one filesystem; a request with reflink=always fails instead of copying"


class _Root(NamedTuple):
    path: str
    fd: int


def pair_checks(roots: tuple[str, ...]) -> Iterator[Check]:
    """For each root one check: the row of a matrix. A root that cannot be opened is left out."""
    with ExitStack() as opened:
        found = []
        for path in roots:
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                opened.callback(os.close, fd)
                found.append(_Root(path, fd))
        for source in found:
            others = [root for root in found if root is not source]
            if others:
                yield _row(source, others)


def _row(source: _Root, others: list[_Root]) -> Check:
    answers = [(root.path, _answer(source, root)) for root in others]
    found = "; ".join(f"to {path}: {answer}" for path, answer in answers)
    if all(answer == "works" for _, answer in answers):
        return Check(f"reflink from {source.path}", "ok", found)
    return Check(f"reflink from {source.path}", "warn", found, _FIX)


def _answer(source: _Root, destination: _Root) -> str:
    try:
        refusal = probe_pair(source.fd, destination.fd)
    except OSError as error:
        return f"not checked ({text_of(error)})"
    except ForkError as error:
        return f"not checked ({error.message})"
    return "works" if refusal is None else f"refused ({refusal.reason})"
