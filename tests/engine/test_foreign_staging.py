"""A user who may write in the destination's parent creates, or moves there, a false staging of a fork."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.errors import ForkError
from tasks.copier.fork_spec import ForkResult
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.support.engine import staged_forks
from tests.support.engine.child_processes import NOBODY, in_child
from tests.support.engine.forks import CHUNKED, assert_alike, fork_with_ledger, leftovers
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.tree import snapshot

ATTACKER = 1000
NAME = control_name("fork-1")


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """A source, a directory elsewhere that must not be touched, and a parent in which everybody may write."""
    workdir = fresh("xfs")
    workdir.chmod(0o755)
    make_guest(workdir / "source")
    make_guest(workdir / "outside")
    (workdir / "parent").mkdir()
    (workdir / "parent").chmod(0o777)
    return workdir


def deliver(workdir: Path) -> ForkResult:
    """Deliver the request to a worker, which makes all chunks itself. Returns the result that it stores."""
    return fork_with_ledger(workdir / "source", workdir / "parent" / "fork", limits=CHUNKED).result


def begun(workdir: Path) -> tuple[Path, dict[str, Any]]:
    return staged_forks.begin_fork(workdir / "source", workdir / "parent" / "fork")


def continue_fork(workdir: Path) -> str:
    return staged_forks.continue_fork(workdir / "source", workdir / "parent" / "fork")


# -- entries that a user made at the path of the control directory


def _directory(path: Path, mode: int = 0o700) -> None:
    path.mkdir()
    path.chmod(mode)
    journal = {"spec": {"fork_id": "fork-1"}, "control": path.stat().st_ino, "attempt": "d/../../outside"}
    (path / "journal").write_text(json.dumps(journal))
    (path / "lock").touch()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(path))


PLANTED: dict[str, Callable[[Path], object]] = {
    "a directory of another user": _directory,
    "a directory that all may enter": lambda path: _directory(path, 0o777),
    "a file": lambda path: path.write_text("theirs"),
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a symlink to a directory": lambda path: path.symlink_to("../outside"),
    "a dangling symlink": lambda path: path.symlink_to("nowhere"),
    "a symlink to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_foreign_control_directory_fails_the_fork_at_once_and_is_kept(workdir: Path, what: str) -> None:
    path = workdir / "parent" / NAME
    in_child(lambda: PLANTED[what](path), user=ATTACKER)
    before = snapshot(workdir / "outside"), path.lstat().st_ino, snapshot(workdir / "parent")
    began = time.monotonic()

    with pytest.raises(ForkError, match="not usable as staging") as raised:
        deliver(workdir)

    assert time.monotonic() - began < 5
    assert os.fspath(path) in str(raised.value)
    assert "remove it" in str(raised.value)
    assert (snapshot(workdir / "outside"), path.lstat().st_ino, snapshot(workdir / "parent")) == before


def test_our_directory_that_others_may_enter_is_not_used_as_staging(workdir: Path) -> None:
    (workdir / "parent" / NAME).mkdir()
    (workdir / "parent" / NAME).chmod(0o770)

    with pytest.raises(ForkError, match="its mode is 0770 and not 0700"):
        deliver(workdir)


@pytest.mark.parametrize("mode", [0o000, 0o500, 0o2700])
def test_a_control_directory_with_an_unfinished_mode_is_used(workdir: Path, mode: int) -> None:
    (workdir / "parent" / NAME).mkdir()
    (workdir / "parent" / NAME).chmod(mode)

    assert deliver(workdir)["status"] == "succeeded"

    assert_alike(workdir / "source", workdir / "parent" / "fork", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir / "parent") == []


def test_our_fork_moved_to_the_control_directory_is_not_emptied(workdir: Path) -> None:
    """A worker of an ordinary user owns all forks; users who may write in their parent may rename them."""
    moved = workdir / "parent" / NAME
    make_guest(moved)
    moved.chmod(0o700)
    before = snapshot(moved)

    result = deliver(workdir)

    assert result["error"] is not None
    assert "which is not a file of forkvm" in result["error"]["message"]
    (moved / "lock").unlink()  # made accessible for the check
    after = snapshot(moved)
    assert {path for path in before if path != b"."} == {path for path in after if path != b"."}
    assert all(after[path] == before[path] for path in before if path != b".")


# -- files of the control directory with contents that no worker writes


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.hardlink_to(target)


def _symlink(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _fifo(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _foreign(path: Path, target: Path) -> None:
    path.touch()
    os.chown(path, ATTACKER, ATTACKER)


def _huge(path: Path, target: Path) -> None:
    path.touch()
    os.truncate(path, 6 << 40)


FILES: dict[str, Callable[[Path, Path], None]] = {
    "a hard link": _link,
    "a symlink": _symlink,
    "a FIFO": _fifo,
    "another user's": _foreign,
    "huge": _huge,
}


@pytest.mark.parametrize("name", ["lock", "journal", "manifest", "closing", "report-plan", "report-0", "chunk-0"])
@pytest.mark.parametrize("change", FILES)
def test_a_file_without_proof_of_origin_ends_the_fork_within_seconds(workdir: Path, change: str, name: str) -> None:
    target = workdir / "outside" / "metadata.json"
    staging, _ = begun(workdir)
    before = snapshot(workdir / "outside")
    FILES[change](staging / name, target)
    began = time.monotonic()

    outcome = continue_fork(workdir)

    assert time.monotonic() - began < 5
    assert "not usable as staging" in outcome, outcome
    assert not (workdir / "parent" / "fork").exists()
    (staging / name).unlink(missing_ok=True)  # another name of the target changes its ctime
    assert snapshot(workdir / "outside").keys() == before.keys()
    assert target.read_bytes() == (workdir / "source" / "metadata.json").read_bytes()


# -- fields


def _with(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda journal: journal.update(fields)


def _in(key: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda journal: journal[key].update(fields)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "an attempt that leads out": _with(attempt="d/../../outside"),
    "an attempt of another length": _with(attempt="0"),
    "an attempt that is a number": _with(attempt=12345678),
    "an unknown phase": _with(phase="done"),
    "a negative count of attempts": _with(tries=-1),
    "a count that is not an integer": _with(closings=True),
    "no control directory": _with(control=None),
    "a plan that is a list": _with(plan=[]),
    "a published tree without a result": _with(phase="publishing", tree=1),
    "a chunk before the manifest": lambda journal: journal["plan"].update(chunks=[["files", -1, 10, 0, 0]]),
    "a chunk behind the manifest": lambda journal: journal["plan"].update(chunks=[["files", 1 << 50, 10, 0, 0]]),
    "a chunk of an unknown kind": lambda journal: journal["plan"].update(chunks=[["dance", 0, 10, 0, 0]]),
    "a chunk that is a text": lambda journal: journal["plan"].update(chunks=["files"]),
    "too many chunks": lambda journal: journal["plan"].update(chunks=[["files", 0, 1, 0, 0]] * 100_001),
    "cloned files outside": lambda journal: journal["plan"].update(cloned=["../../outside/disk"]),
    "an invalid refused errno": lambda journal: journal["plan"].update(refused=[[0, 0, 99_999]]),
    "a source that is a file": lambda journal: journal["plan"].update(top=["", "", 0, *[0] * 11]),
    "too many entries": lambda journal: journal["plan"].update(entries=10**30),
    "a request without a source": lambda journal: journal["spec"].pop("source"),
    "a relative destination": _in("spec", destination="fork"),
    "options of another shape": _in("spec", options={"reflink": []}),
    "an invalid owner": _in("spec", owner="root"),
    "a request and a campaign": _in("spec", campaign_id="fork-1"),
    "an invalid start time": _in("spec", started=float("nan")),
    "an unknown field": _with(more="of it"),
}
RAW: dict[str, bytes] = {
    "null": b"null",
    "nothing": b"",
    "deep": b"[" * 1_000_000,
    "a number of a million digits": b"1" * 1_000_000,
    "no text": b"\xff\xfe\x00",
    "infinite": b'{"tries": 1e999}',
}


@pytest.mark.parametrize("what", [*HOSTILE, *RAW])
@pytest.mark.parametrize("cancels", [False, True])
def test_a_forged_journal_neither_leads_out_of_the_staging_nor_causes_endless_retries(
    workdir: Path, what: str, cancels: bool
) -> None:
    """The delivery starts again, or fails; then the same request can be made."""
    staging, journal = begun(workdir)
    before = snapshot(workdir / "outside")
    if what in RAW:
        data = RAW[what]
    else:
        HOSTILE[what](journal)
        data = json.dumps(journal).encode()
    (staging / "journal").write_bytes(data)

    outcome = (
        staged_forks.cancel_fork(workdir / "source", workdir / "parent" / "fork") if cancels else continue_fork(workdir)
    )

    assert "unexpected" not in outcome
    assert snapshot(workdir / "outside") == before
    if not (workdir / "parent" / "fork").exists():
        assert deliver(workdir)["status"] == "succeeded"
    assert_alike(workdir / "source", workdir / "parent" / "fork", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir / "parent") == []


@pytest.mark.parametrize("name", ["manifest", "closing", "report-plan", "report-0", "chunk-0"])
@pytest.mark.parametrize("data", [b"", b"null\n", b"{}\n", b"\xff" * 4096, b"[" * 100_000 + b"\n", b"0" * 4000])
def test_a_forged_file_fails_the_fork_or_has_no_effect(workdir: Path, name: str, data: bytes) -> None:
    staging, _ = begun(workdir)
    (staging / name).write_bytes(data)

    outcome = continue_fork(workdir)

    assert "unexpected" not in outcome
    if (workdir / "parent" / "fork").exists():
        assert_alike(workdir / "source", workdir / "parent" / "fork", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir / "parent") == []


def test_a_journal_with_another_digit_never_makes_a_wrong_fork(fresh: Fresh) -> None:
    """Every digit of its plan. Without a checksum, two dozen of the changes left holes in a file copied in ranges."""
    workdir = fresh("xfs_noreflink")
    (workdir / "source").mkdir()
    (workdir / "parent").mkdir()
    make_sparse_file(workdir / "source" / "disk", 4 * MIB, 4 * MIB)
    tried, text = 0, begun(workdir)[0].joinpath("journal").read_text()
    plan = text.index('"chunks"')
    for number in range(len(re.findall("[0-9]", text[plan : text.index("]]", plan)]))):
        shutil.rmtree(workdir / "parent")
        (workdir / "parent").mkdir()
        path = begun(workdir)[0] / "journal"
        text = path.read_text()
        at = [found.start() for found in re.finditer("[0-9]", text[text.index('"chunks"') :])][number]
        at += text.index('"chunks"')
        path.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}")

        assert "unexpected" not in continue_fork(workdir)

        if (workdir / "parent" / "fork").exists():
            tried += 1
            assert_alike(workdir / "source", workdir / "parent" / "fork", SKIPPED_BY_DEFAULT)
    assert tried > 20


def test_a_fork_without_a_planning_report_fails(workdir: Path) -> None:
    staging, _ = begun(workdir)
    (staging / "report-plan").unlink()

    assert "the report of its planning is missing" in continue_fork(workdir)

    assert not (workdir / "parent" / "fork").exists()
    assert leftovers(workdir / "parent") == []


def test_the_journal_of_another_fork_is_not_used(workdir: Path) -> None:
    staging, journal = begun(workdir)
    journal["spec"]["fork_id"] = "fork-2"
    (staging / "journal").write_text(json.dumps(journal))

    assert "its journal belongs to another fork" in continue_fork(workdir)
    assert "its journal belongs to another fork" in staged_forks.cancel_fork(
        workdir / "source", workdir / "parent" / "fork"
    )


def test_a_copy_of_a_control_directory_is_not_used(workdir: Path) -> None:
    staging, _ = begun(workdir)
    staging.rename(workdir / "parent" / "aside")
    shutil.copytree(workdir / "parent" / "aside", staging)
    staging.chmod(0o700)

    assert "it is a copy of a staging directory" in continue_fork(workdir)
    assert "it is a copy of a staging directory" in staged_forks.cancel_fork(
        workdir / "source", workdir / "parent" / "fork"
    )


# -- the tree


def _swap_tree(workdir: Path, staging: Path) -> None:
    """Put another directory in place of the tree, as a user who may write in the parent can."""
    journal = json.loads((staging / "journal").read_bytes())
    tree = staging.with_name(f"{NAME}.{journal['attempt']}")

    def swap() -> None:
        tree.rename(workdir / "parent" / "aside")
        tree.mkdir()
        (tree / "theirs").touch()

    in_child(swap, user=ATTACKER)


def test_a_tree_replaced_between_two_chunks_fails_the_fork_and_is_kept(workdir: Path) -> None:
    staging, journal = begun(workdir)
    _swap_tree(workdir, staging)

    outcome = continue_fork(workdir)

    assert "it is not the directory that this fork was made in" in outcome
    assert not (workdir / "parent" / "fork").exists()
    assert os.listdir(workdir / "parent" / f"{NAME}.{journal['attempt']}") == ["theirs"]


def test_a_tree_replaced_before_its_rename_is_never_reported_as_the_fork(workdir: Path) -> None:
    staging, _ = begun(workdir)
    parent_fd = os.open(workdir / "parent", os.O_RDONLY)
    with Staging.attach(parent_fd, "fork-1", wait=0, alone=True) as held:
        assert held is not None
        journal = held.journal()
        assert journal is not None
        _swap_tree(workdir, staging)
        tree = held.tree_name(journal)

        with pytest.raises(ForkError, match="it is not the directory"):
            held.publish(journal, "fork", sync=False)

    os.close(parent_fd)
    assert not (workdir / "parent" / "fork").exists()
    assert os.listdir(workdir / "parent" / tree) == ["theirs"]


@pytest.mark.parametrize("bits", [{"uid": 0, "mode": 0o104755}, {"uid": NOBODY}, {"gid": 0}, {"mode": 0o102777}])
def test_owner_and_mode_of_a_clone_come_from_the_source_not_from_the_manifest(
    workdir: Path, bits: dict[str, int]
) -> None:
    for path in (workdir / "source").rglob("*"):
        os.chown(path, ATTACKER, ATTACKER, follow_symlinks=False)
    staging, _ = begun(workdir)
    staged_forks.change_manifest(staging / "manifest", bits)

    outcome = continue_fork(workdir)

    assert "source_changed" in outcome
    assert not (workdir / "parent" / "fork").exists()
    assert leftovers(workdir / "parent") == []
