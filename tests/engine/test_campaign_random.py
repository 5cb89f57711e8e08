"""Any tree, cloned into any number of destinations in batches of any size, equals the source in each of them."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.copier.campaign import batch_build
from tasks.copier.campaign import plan as campaign_plan
from tests.fixtures.filesystems import Fresh, Kind, fresh_directory
from tests.support.engine.forks import assert_alike, leftovers
from tests.support.engine.local_campaigns import campaign, campaign_with_ledger
from tests.support.engine.random_trees import Directory, make, trees
from tests.support.system.result_checks import check_file_results

KINDS: list[Kind] = ["xfs", "btrfs", "ext4", "tmpfs"]
EXAMPLES = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(
    tree=trees,
    count=st.integers(1, 9),
    most=st.integers(1, 5),
    open_files=st.integers(1, 4),
    children=st.booleans(),
    taken=st.sets(st.integers(0, 8), max_size=2),
)
def test_every_fork_of_any_tree_equals_it(
    kind: Kind, fresh: Fresh, tree: Directory, count: int, most: int, open_files: int, children: bool, taken: set[int]
) -> None:
    with (
        fresh_directory(fresh(kind)) as directory,
        patch.object(campaign_plan, "MOST_IN_BATCH", most),
        patch.object(batch_build, "OPEN_FILES", open_files),
    ):
        source, records = directory / "source", directory / "records"
        make(os.fsencode(source), tree, [])
        paths = [directory / f"vm-{n}" for n in range(count)]
        for n in taken & set(range(count)):
            paths[n].mkdir()

        if children:
            result = campaign(source, paths, exclude=())
        else:
            result, ledger = campaign_with_ledger(source, paths, records, exclude=())
            for n, fork in enumerate(ledger.forks):
                check_file_results(fork, ledger.files(n))

        assert result["forks"]["failed"] == len(taken & set(range(count)))
        assert result["forks"]["succeeded"] == count - result["forks"]["failed"]
        for n, path in enumerate(paths):
            if n not in taken:
                assert_alike(source, path)
        assert leftovers(directory) == []
