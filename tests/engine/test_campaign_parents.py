"""A campaign into several parents. In one of them, another entry is at the path of the control directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.campaign.finish import end_rest, remove_annexes
from tasks.copier.errors import cancelled
from tasks.copier.progress import Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import control_name
from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import leftovers, never_stop
from tests.support.engine.local_campaigns import (
    ID,
    SIZES,
    Ledger,
    campaign,
    codes,
    counts,
    destinations,
    firsts,
    holding,
    plan,
)
from tests.support.engine.local_campaigns import make_batches as make
from tests.support.guests import make_guest

OTHER = 1000


def _foreign(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, OTHER, OTHER)


def _with_fifo(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.mkfifo(path / "journal")


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "file": Path.touch,
    "FIFO": os.mkfifo,
    "dangling symlink": lambda path: path.symlink_to("nowhere"),
    "foreign": _foreign,
    "FIFO as journal": _with_fifo,
}


@pytest.fixture
def parents(fresh: Fresh) -> list[Path]:
    directory = fresh("xfs")
    made = [directory / name for name in ("home", "bad", "last")]
    for parent in made:
        parent.mkdir()
    return made


@pytest.fixture
def source(parents: list[Path]) -> Path:
    return make_guest(parents[0].parent / "source", SIZES)


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_forks_into_the_other_parents_are_made(what: str, parents: list[Path], source: Path) -> None:
    paths = [parent / f"vm-{n}" for parent in parents for n in range(3)]
    planted = parents[1] / control_name(ID)
    IN_THE_WAY[what](planted)

    result = campaign(source, paths)

    assert counts(result) == (6, 3, 0)
    assert set(codes(result).values()) == {"io_error"}
    assert [leftovers(parent) for parent in parents] == [[], [planted.name], []]


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_the_end_of_a_campaign_skips_the_parent(what: str, parents: list[Path], source: Path, tmp_path: Path) -> None:
    # Given a half-done campaign whose control directory in one parent was replaced
    paths = [path for parent in parents for path in destinations(parent, 3)]
    plan(source, paths)
    ledger = Ledger(tmp_path)
    with holding(paths[0]) as found:
        some = list(firsts(found))[::2]
    make(paths[0], ledger, only=some)
    annex = parents[1] / control_name(ID)
    if annex.exists():
        annex.rename(parents[1] / "away")
    IN_THE_WAY[what](annex)

    # When
    with holding(paths[0]) as found:
        end_rest(found, Roots(), Ticker(never_stop), ledger, cancelled(found.spec.source))
        remove_annexes(found, Roots())
        found.staging.remove()

    # Then every fork has a result, and nothing of ours is left
    assert {fork["destination"] for fork in ledger.forks} == set(map(os.fspath, paths))
    assert [leftovers(parent) for parent in (parents[0], parents[2])] == [[], []]
    assert os.path.lexists(annex)
