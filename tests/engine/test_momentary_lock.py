"""A local command waits for the lock of its staging: `gc` holds it for an instant, to see whether a process uses it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.estimate.estimate import estimate
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.support.engine import local_campaigns
from tests.support.engine.forks import INLINE, fork, leftovers, never_stop, spec_of

ID = "held"


def _fork(workdir: Path) -> object:
    return fork(workdir / "a", workdir / "b", fork_id=ID)["error"]


def _campaign(workdir: Path) -> object:
    return local_campaigns.campaign(workdir / "a", [workdir / "b"], campaign_id=ID)["error"]


def _estimate(workdir: Path) -> object:
    return estimate(spec_of(workdir / "a", workdir / "b", ID), Roots(), INLINE, never_stop)["warnings"]


@pytest.mark.parametrize("command", [_fork, _campaign, _estimate])
def test_a_local_command_waits_for_a_lock_that_is_held_for_an_instant(
    fresh: Fresh, command: Callable[[Path], object]
) -> None:
    # Given
    workdir = fresh("xfs")
    (workdir / "a").mkdir()
    (workdir / "a" / "disk").write_bytes(b"disk")
    parent_fd = os.open(workdir, os.O_RDONLY)
    answers: list[object] = []

    # When it begins while another process holds the lock
    with Staging.claim(parent_fd, ID, wait=0) as staging:
        running = threading.Thread(target=lambda: answers.append(command(workdir)))
        running.start()
        running.join(0.2)
        assert answers == []
        staging.remove()
    running.join()
    os.close(parent_fd)

    # Then
    assert answers in ([None], [[]])
    assert leftovers(workdir) == []
