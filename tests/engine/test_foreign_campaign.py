"""Files that another user wrote into, or put in place of, the staging of a campaign."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.campaign.batch_record import Record
from tasks.copier.errors import ForkError
from tasks.copier.staging.control_directory import control_name
from tests.fixtures.filesystems import Fresh
from tests.support.engine.child_processes import in_child
from tests.support.engine.forks import assert_alike, leftovers
from tests.support.engine.local_campaigns import ID, Ledger, destinations, end, make_batches, plan
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.tree import snapshot

ATTACKER = 1000
NAME = control_name(ID)
TREE = f"{NAME}.0123abcd"


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """A planned campaign of two forks, and a directory elsewhere that must not be touched."""
    workdir = fresh("xfs")
    workdir.chmod(0o755)
    make_guest(workdir / "source")
    make_guest(workdir / "outside")
    (workdir / "home").mkdir()
    (workdir / "home").chmod(0o777)
    (workdir / "ledger").mkdir()
    plan(workdir / "source", destinations(workdir / "home", 2))
    return workdir


def make(workdir: Path) -> None:
    """Have a worker make all batches and finish the campaign; each fork must equal the source."""
    home = destinations(workdir / "home", 2)
    make_batches(home[0], Ledger(workdir / "ledger"))
    end(home[0], Ledger(workdir / "ledger"))
    for path in home:
        if path.exists():
            assert_alike(workdir / "source", path, SKIPPED_BY_DEFAULT)


def _record(**fields: Any) -> bytes:
    head = {"trees": {}, "identities": {}, "pages": {}, **fields}
    results = [json.dumps({"status": "succeeded"}) for _ in head["pages"]]
    return "\n".join([json.dumps(head), *results, ""]).encode()


RECORDS: dict[str, bytes] = {
    "a tree that leads out": _record(trees={"0": "../outside"}),
    "an absolute tree": _record(trees={"0": "/outside"}),
    "another control directory's tree": _record(trees={"0": ".forkvm-0123456789abcdef.01234567"}),
    "the control directory as a tree": _record(trees={"0": NAME}),
    "a fork as a tree": _record(trees={"0": "vm-1"}),
    "a complete tree without a result": _record(trees={"0": TREE}, identities={"0": 1}),
    "a result of another fork": _record(trees={"0": TREE}, identities={"0": 1}, pages={"0": []}),
    "a fork without an index": _record(trees={"x": TREE}),
    "a fork beyond the campaign": _record(trees={"99": TREE}, identities={"99": 1}, pages={"99": []}),
    "an identity that is too large": _record(trees={"0": TREE}, identities={"0": 1 << 200}, pages={"0": []}),
    "missing pages": _record(trees={"0": TREE}, identities={"0": 1}, pages={"0": [1 << 40]}),
    "null": b"null\n",
    "deep": b"[" * 1_000_000,
    "nothing": b"",
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_forged_record_neither_leads_out_of_the_staging_nor_replaces_a_fork(workdir: Path, what: str) -> None:
    before = snapshot(workdir / "outside")
    (workdir / "home" / NAME / "batch-0-1").write_bytes(RECORDS[what])

    make(workdir)

    assert snapshot(workdir / "outside") == before
    assert all(path.exists() for path in destinations(workdir / "home", 2))
    assert leftovers(workdir / "home") == []


def test_a_record_is_read_with_the_names_of_its_own_control_directory() -> None:
    with pytest.raises(ForkError, match="damaged"):
        Record.from_bytes(_record(trees={"0": "../outside"}))
    assert Record.from_bytes(_record(trees={"0": TREE})).trees == {0: TREE}


LISTS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:20],
    "empty": lambda data: b"",
    "other offsets": lambda data: b"\xff" * 24 + data[24:],
    "a path that climbs": lambda data: data.replace(b"/home/", b"/../x/"),
    "another path": lambda data: data.replace(b"vm-001", b"vm-007"),
    "a relative path": lambda data: data.replace(b"/tmp", b"xtmp"),
}


@pytest.mark.parametrize("what", LISTS)
def test_a_forged_list_of_destinations_is_refused(workdir: Path, what: str) -> None:
    before = snapshot(workdir / "outside")
    path = workdir / "home" / NAME / "destinations"
    path.write_bytes(LISTS[what](path.read_bytes()))

    with pytest.raises(ForkError, match="the staging directory is damaged"):
        make(workdir)

    assert snapshot(workdir / "outside") == before


@pytest.mark.parametrize("name", ["destinations", "manifest", "closing", "journal", "lock"])
def test_a_file_that_is_a_symlink_is_not_followed(workdir: Path, name: str) -> None:
    path = workdir / "home" / NAME / name
    path.unlink()
    path.symlink_to(workdir / "outside" / "metadata.json")
    before = snapshot(workdir / "outside")

    with suppress(ForkError, AssertionError):  # without a journal it is not a planned campaign
        make(workdir)

    assert snapshot(workdir / "outside") == before
    assert not any(path.exists() for path in destinations(workdir / "home", 2))


def test_a_foreign_control_directory_fails_only_the_forks_in_its_parent(fresh: Fresh) -> None:
    workdir = fresh("xfs")
    workdir.chmod(0o755)
    make_guest(workdir / "source")
    for name in ("one", "two"):
        (workdir / name).mkdir()
        (workdir / name).chmod(0o777)
    (workdir / "ledger").mkdir()
    paths = [workdir / "one" / "vm", workdir / "two" / "vm"]
    plan(workdir / "source", paths)
    in_child(lambda: os.mkdir(workdir / "two" / NAME, 0o700), user=ATTACKER)

    make_batches(paths[0], Ledger(workdir / "ledger"))
    result = end(paths[0], Ledger(workdir / "ledger"))

    assert_alike(workdir / "source", paths[0], SKIPPED_BY_DEFAULT)
    assert not paths[1].exists()
    assert [failure["destination"] for failure in result["failures"]] == [os.fspath(paths[1])]
    assert "not usable as staging" in result["failures"][0]["error"]["message"]
    assert os.listdir(workdir / "two") == [NAME]
