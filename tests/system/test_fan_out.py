"""Forks that are too large for one task: several children, byte ranges, and never more than one of each result."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker
from tests.support.extents import allocated_bytes, data_extents, sharing
from tests.support.guests import MIB, make_guest, make_sparse_file
from tests.support.system.result_checks import check_file_results, check_fork_result, entries_of
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import SMALL_LIMITS, StartSystem, System
from tests.support.tree import snapshot

_CHUNK_LINE = re.compile(r"(ForkPoolWorker-\d+)\] Task forkvm\.chunk\[(\S+)\.chunk\.(\d+)\] succeeded")


def _workers_of_chunks(log: str, fork_id: str) -> dict[int, str]:
    """The child that made each chunk, according to the worker's log."""
    return {int(number): child for child, id_, number in _CHUNK_LINE.findall(log) if id_ == fork_id}


def test_both_children_work_on_the_chunks_of_one_fork(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    result = scheduler.fork(large_source, workdir / "b", "fork-both")

    system.assert_left_nothing_in(workdir)
    done_by = _workers_of_chunks(system.worker.output(), "fork-both")
    # On an idle machine, the first ones were made while the planner still walked.
    assert set(done_by) <= set(range(result["chunks"]))
    shares = {child: list(done_by.values()).count(child) for child in set(done_by.values())}
    assert len(shares) == 2
    assert min(shares.values()) > result["chunks"] // 10
    # and the fork made by both equals the source, entry by entry
    assert snapshot(workdir / "b") == snapshot(large_source)
    check_fork_result(result)
    files = scheduler.files("fork-both")
    check_file_results(result, files)
    assert {file["path"] for file in files} == entries_of(large_source)


def test_fork_beyond_the_inline_limits_without_reflink_copies_a_large_file_in_ranges_and_preserves_its_holes(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given a disk whose data is in its first MiB, its last, and scattered between, among other files
    directory = fresh("ext4")
    source = make_guest(directory / "a")
    disk = source / "disk.raw"
    make_sparse_file(disk, 512 * MIB + 4096 + 123, 24 * MIB, seed=3)
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"first", 0)
        os.pwrite(file.fileno(), b"last", 512 * MIB + 4096 + 119)
    os.link(disk, source / "disk.again")

    # When
    result = scheduler.fork(source, directory / "b")

    # Then
    assert result["status"] == "succeeded"
    assert result["chunks"] > 20
    files = {file["path"]: file for file in scheduler.files(result["fork_id"])}
    check_file_results(result, list(files.values()))
    first, second = sorted(("disk.raw", "disk.again"), key=lambda name: files[name]["method"])
    assert (files[first]["method"], files[second]["method"]) == ("copy", "hardlink")
    data = sum(end - start for start, end in data_extents(disk))
    assert files[first]["bytes"] == disk.stat().st_size
    assert data <= files[first]["copied_bytes"] <= data + MIB
    copy = directory / "b" / "disk.raw"
    fork, original = snapshot(directory / "b"), snapshot(source)
    assert fork[b"disk.raw"] == original[b"disk.raw"]
    assert fork[b"disk.raw"].links == (b"disk.again", b"disk.raw")
    assert abs(allocated_bytes(copy) - allocated_bytes(disk)) <= MIB
    assert data_extents(copy)[0][0] == 0
    system.assert_left_nothing_in(directory)


def test_reflinked_fork_of_many_files_is_made_in_chunks_and_every_extent_is_shared(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "a")
    for n in range(500):
        layer = source / f"layer-{n % 7}"
        layer.mkdir(exist_ok=True)
        (layer / f"block-{n}").write_bytes(b"%d" % n * 4096)

    result = scheduler.fork(source, directory / "b", "fork-layers")

    assert result["chunks"] > 2
    assert (result["files"]["reflinked"], result["files"]["copied"]) == (506, 0)
    check_file_results(result, scheduler.files("fork-layers"))
    assert all(sharing(path).whole for path in (directory / "b").rglob("block-*"))
    # and a write to the fork leaves the source unchanged
    before = snapshot(source)
    for path in (directory / "b").rglob("block-*"):
        path.write_bytes(b"changed")
    assert snapshot(source) == before
    system.assert_left_nothing_in(directory)


def test_other_forks_are_made_beside_a_large_one(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    large = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")})

    for n in range(5):
        assert scheduler.fork(directory / "a", directory / f"b-{n}")["status"] == "succeeded"
    small_ones_first = not large.ready()

    assert scheduler.wait(large)["status"] == "succeeded"
    assert small_ones_first  # they waited for a chunk or two, not for the whole fork
    system.assert_left_nothing_in(workdir, directory)


def test_many_simultaneous_forks_each_have_their_own_result(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    sources = [make_guest(directory / f"a-{n}", seed=n) for n in range(3)]
    requests = {
        f"fork-{n}": {"source": str(sources[n % 3]), "destination": str(directory / f"b-{n}"), "labels": [str(n)]}
        for n in range(60)
    }

    sent = {fork_id: scheduler.send(request, fork_id) for fork_id, request in requests.items()}
    results = {fork_id: scheduler.wait(one) for fork_id, one in sent.items()}

    for fork_id, request in requests.items():
        assert results[fork_id]["fork_id"] == fork_id
        assert results[fork_id]["labels"] == request["labels"]
        assert results[fork_id]["destination"] == request["destination"]
    wanted = [snapshot(source)[b"overlay.raw"] for source in sources]
    assert all(snapshot(directory / f"b-{n}")[b"overlay.raw"] == wanted[n % 3] for n in range(0, 60, 7))
    system.assert_left_nothing_in(directory)


def test_two_workers_share_the_chunks_of_one_fork(
    start_system: StartSystem, start_worker: StartWorker, mounts: Path, large_source: Path, workdir: Path
) -> None:
    system = start_system(concurrency=1)
    other = start_worker(mounts, 1, env=SMALL_LIMITS)

    result = system.scheduler.fork(large_source, workdir / "b", "fork-shared")

    system.assert_left_nothing_in(workdir)
    shares = [_workers_of_chunks(worker.output(), "fork-shared") for worker in (system.worker, other)]
    assert all(shares)
    assert set().union(*shares) < set(range(result["chunks"]))  # the planner's process made the others
    check_file_results(result, system.scheduler.files("fork-shared"))
    assert snapshot(workdir / "b") == snapshot(large_source)
