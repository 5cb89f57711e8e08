"""`durability: sync`: a campaign is on disk before it is reported as succeeded. The order of system calls shows it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.copier.campaign import batch_record
from tasks.copier.campaign import plan as campaign_plan
from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.kernel import syscalls
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import ROOT
from tests.support.engine.child_processes import Child
from tests.support.engine.local_campaigns import Ledger, campaign_with_ledger, destinations, holding, make_batches, plan
from tests.support.guests import MIB, make_sparse_file
from tests.support.requirements import require_command

#: One system call with the paths of its descriptors (`strace -y`).
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += 0$")


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    (directory / "source").mkdir()
    make_sparse_file(directory / "source" / "disk.raw", MIB, MIB)
    return directory / "source"


def trace(source: Path, directory: Path, tmp_path: Path, durability: str) -> list[tuple[str, str]]:
    """The system calls of a campaign of three forks that write to the disk or publish, in order."""
    strace = require_command("strace", "the order of system calls")
    script = (
        "from tasks.copier.campaign import plan as campaign_plan; "
        "from tests.support.engine.local_campaigns import main; "
        "campaign_plan.LEAST_BATCHES, campaign_plan.BATCH_SECONDS = 1, 60.0; main()"
    )
    command = [strace, "-f", "-y", "-o", str(tmp_path / "trace"), "-e", "trace=syncfs,fsync,rename,renameat,renameat2"]
    paths = map(str, destinations(directory, 3))
    subprocess.run(
        [*command, sys.executable, "-c", script, str(source), str(tmp_path / "ledger"), durability, *paths],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        timeout=60,
    )
    found = (_CALL.match(line) for line in (tmp_path / "trace").read_text().splitlines())
    return [(match[1], match[2]) for match in found if match]


def test_data_is_synced_before_the_record_before_the_renames_before_the_result(
    directory: Path, source: Path, tmp_path: Path
) -> None:
    calls = trace(source, directory, tmp_path, "sync")

    def only(name: str, words: str) -> list[int]:
        return [at for at, (call, arguments) in enumerate(calls) if call == name and words in arguments]

    (data,) = only("syncfs", ".forkvm-")
    record, control = only("fsync", "batch-0-1.new")[0], only("fsync", "/.forkvm-")[-1]
    published = [at for at, (call, what) in enumerate(calls) if call == "renameat2" and '"vm-00' in what]
    (parent,) = only("fsync", f"<{directory}>")
    settled = only("rename", "/ledger/")[0]
    assert len(published) == 3
    assert data < record < control < published[0]
    assert published[-1] < parent < settled


def test_without_sync_nothing_is_synced(directory: Path, source: Path, tmp_path: Path) -> None:
    calls = trace(source, directory, tmp_path, "none")

    assert not [call for call in calls if call[0] in ("fsync", "syncfs")]


def test_forks_taken_over_from_a_killed_process_are_synced_before_they_are_reported(
    directory: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a batch that was killed between two renames
    monkeypatch.setattr(campaign_plan, "LEAST_BATCHES", 1)
    (tmp_path / "ledger").mkdir()
    ledger, paths = Ledger(tmp_path / "ledger"), destinations(directory, 3)
    plan(source, paths, durability="sync")
    child = Child(lambda: _kill_self_at_the_second_rename(paths, ledger))
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()

    # When
    events: list[str] = []
    sync, store_outcomes = os.fsync, Ledger.store_outcomes

    def sync_noted(fd: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    def settle_noted(ledger: Ledger, first: int, outcomes: list[Outcome]) -> None:
        events.append("settled")
        store_outcomes(ledger, first, outcomes)

    monkeypatch.setattr(os, "fsync", sync_noted)
    monkeypatch.setattr(Ledger, "store_outcomes", settle_noted)
    make_batches(paths[0], ledger)

    # Then
    assert [fork["status"] for fork in ledger.forks] == ["succeeded"] * 3
    assert events == [str(directory), "settled"]


def _kill_self_at_the_second_rename(paths: list[Path], ledger: Ledger) -> None:
    rename, calls = syscalls.rename_noreplace, [0]

    def counted(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str) -> None:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(src_dir_fd, src, dst_dir_fd, dst)

    syscalls.rename_noreplace = counted  # in this child only
    make_batches(paths[0], ledger)


def test_a_parent_directory_that_cannot_be_synced_fails_and_removes_the_forks(
    directory: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), os.stat(directory)):
            raise OSError(5, os.strerror(5))

    monkeypatch.setattr(campaign_plan, "LEAST_BATCHES", 1)
    monkeypatch.setattr(os, "fsync", refuse)

    result, ledger = campaign_with_ledger(source, destinations(directory, 3), tmp_path / "ledger", durability="sync")

    assert result["forks"]["failed"] == 3
    assert {fork["error"] and fork["error"]["code"] for fork in ledger.forks} == {"io_error"}
    assert [path.name for path in directory.iterdir()] == ["source"]


def test_a_record_truncated_by_power_loss_is_ignored(directory: Path, source: Path, tmp_path: Path) -> None:
    """Nothing of it was published: it is on disk before the first rename."""
    (tmp_path / "ledger").mkdir()
    ledger, paths = Ledger(tmp_path / "ledger"), destinations(directory, 3)
    plan(source, paths)
    (control,) = directory.glob(".forkvm-*")
    for cut in (b"", b"{", b'{"trees": {"0": "x"}}'):
        (control / "batch-0-1").write_bytes(cut)
        with holding(paths[0]) as found:
            assert list(batch_record.read_all(found.staging, 0)) == []
    make_batches(paths[0], ledger)

    assert [fork["status"] for fork in ledger.forks] == ["succeeded"] * 3
