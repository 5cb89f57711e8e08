"""A filesystem that cannot publish a fork is detected before anything is copied."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tasks.copier.errors import ErrorRecord
from tasks.copier.options import Limits
from tasks.copier.staging.self_test import probe_filesystem
from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Passthrough
from tests.support.engine.forks import fork, forked, leftovers
from tests.support.engine.local_campaigns import campaign, codes, counts, destinations
from tests.support.guests import make_guest


@pytest.fixture
def refusing(passthrough: Passthrough, tmp_path: Path) -> Path:
    """A directory on a filesystem that refuses every flag of renameat2(2)."""
    (tmp_path / "backing").mkdir()
    return passthrough(tmp_path / "backing", "refuse_flags")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_guest(tmp_path / "source")


def assert_says_what_is_missing(error: ErrorRecord, directory: Path, destination: Path) -> None:
    assert (error["code"], error["errno"], error["path"]) == ("io_error", errno.EINVAL, str(destination))
    assert f"the filesystem of {directory} does not support renameat2(RENAME_NOREPLACE)" in error["message"]
    assert "choose a destination on" in error["message"]


def test_a_fork_fails_before_anything_is_copied(refusing: Path, source: Path, limits: Limits) -> None:
    result = fork(source, refusing / "fork", limits=limits)

    assert result["error"] is not None
    assert_says_what_is_missing(result["error"], refusing, refusing / "fork")
    assert (result["files"]["total"], result["bytes"]["copied"]) == (0, 0)
    assert list(refusing.iterdir()) == []


def test_a_campaign_fails_in_that_parent_alone(refusing: Path, source: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    bad = destinations(refusing, 3)

    result = campaign(source, [*bad, *destinations(good, 2)])

    assert (result["status"], counts(result)) == ("partial", (2, 3, 0))
    assert set(codes(result)) == {path.name for path in bad}
    for failure, path in zip(result["failures"], bad, strict=True):
        assert_says_what_is_missing(failure["error"], refusing, path)
    assert list(refusing.iterdir()) == []
    assert leftovers(good) == []


def test_an_unknown_filesystem_is_tested_and_used(passthrough: Passthrough, source: Path, tmp_path: Path) -> None:
    (tmp_path / "backing").mkdir()
    able = passthrough(tmp_path / "backing")

    forked(source, able / "fork")


def test_doctor_detects_it_too(refusing: Path, passthrough: Passthrough, tmp_path: Path, fresh: Fresh) -> None:
    (tmp_path / "other").mkdir()
    errnos = []
    for directory in (refusing, passthrough(tmp_path / "other"), fresh("xfs")):
        fd = os.open(directory, os.O_RDONLY)
        try:
            error = probe_filesystem(fd).rename_error
        finally:
            os.close(fd)
        errnos.append(None if error is None else error.errno)
        assert list(directory.iterdir()) == []

    assert errnos == [errno.EINVAL, None, None]
