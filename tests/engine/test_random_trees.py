"""Any tree, forked with any limits on any filesystem, equals the source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, Kind, fresh_directory
from tests.support.engine.forks import MIB, assert_alike, fork_with_ledger, forked, times
from tests.support.engine.random_trees import Directory, make, trees

KINDS: list[Kind] = ["xfs", "btrfs", "ext4", "tmpfs"]
#: About 10 s for each filesystem.
EXAMPLES = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

limits_ = st.builds(
    Limits,
    inline_files=st.sampled_from([0, 3, 2000]),
    inline_bytes=st.sampled_from([0, MIB, 64 * MIB]),
    chunk_files=st.integers(1, 8),
    chunk_bytes=st.sampled_from([1, 100_000, MIB, 256 * MIB]),
    max_chunks=st.sampled_from([2, 7, 500]),
)


@pytest.fixture(params=KINDS)
def mount(request: pytest.FixtureRequest) -> Path:
    mount: Path = request.getfixturevalue(request.param)
    return mount


@EXAMPLES
@given(tree=trees, limits=limits_, reflink=st.sampled_from(["auto", "auto", "never"]))
def test_any_tree_is_forked_unchanged(mount: Path, tree: Directory, limits: Limits, reflink: str) -> None:
    with fresh_directory(mount) as directory:
        source = directory / "source"
        make(os.fsencode(source), tree, [])
        before = times(source)

        ledger = fork_with_ledger(source, directory / "fork", limits=limits, reflink=reflink, exclude=())

        assert ledger.result["error"] is None
        assert ledger.result["files"]["total"] == len(ledger.files) == len(before) - 1
        assert {path: time for path, time in times(source).items() if path in before} == before
        assert_alike(source, directory / "fork")


@settings(EXAMPLES, max_examples=80)
@given(tree=trees, limits=limits_)
def test_any_tree_is_forked_by_two_children_onto_another_filesystem(
    fresh: Fresh, xfs: Path, ext4: Path, tree: Directory, limits: Limits
) -> None:
    with fresh_directory(xfs) as here, fresh_directory(ext4) as there:
        make(os.fsencode(here / "source"), tree, [])

        forked(here / "source", there / "fork", limits=limits, exclude=())

        assert_alike(here / "source", there / "fork")
