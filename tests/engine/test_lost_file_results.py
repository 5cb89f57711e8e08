"""The FileResults of a fork in chunks are complete although its ledger has lost some of them."""

from __future__ import annotations

from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import Ledger
from tests.support.engine.staged_forks import begin_fork, continue_fork


def test_a_fork_whose_ledger_lost_what_earlier_parts_kept_has_all_its_file_results(fresh: Fresh) -> None:
    """A Redis that is killed forgets its last second. The parts are recorded as done in the staging."""
    # Given a fork whose plan and first chunk are done
    workdir = fresh("xfs")
    source, names = workdir / "a", [f"disk-{number}" for number in range(8)]
    for name in names:
        (source / name).mkdir(parents=True)
        (source / name / "data").write_bytes(b"data")
    begin_fork(source, workdir / "b")

    # When it is continued with a ledger that has nothing of it
    ledger = Ledger()
    outcome = continue_fork(source, workdir / "b", ledger)

    # Then
    assert outcome == "succeeded"
    assert ledger.files.keys() == {*names, *(f"{name}/data" for name in names)}
