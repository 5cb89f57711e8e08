"""How a fork is split into chunks: nothing twice, nothing missing, and never more messages than allowed."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.plan import Chunk, Plan, make_plan
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.report import Report
from tasks.copier.roots import Roots
from tasks.copier.source import manifest
from tasks.copier.space.reservation import job_of
from tasks.copier.space.room import Room
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work
from tests.fixtures.filesystems import Fresh, Kind
from tests.support.engine.forks import INLINE, MIB, assert_alike, fork_with_ledger, never_stop, spec_of
from tests.support.guests import make_sparse_file
from tests.support.requirements import require_command


class Planned:
    """A plan, and the paths of the files in each of its chunks."""

    def __init__(self, plan: Plan, files: list[list[str]], made: dict[str, int]) -> None:
        self.plan = plan
        self.files = files
        #: Size of each file that the planner made.
        self.made = made

    def ranges(self, path: str) -> list[tuple[int, int]]:
        return [
            (chunk.start, chunk.end)
            for chunk, files in zip(self.plan.chunks, self.files, strict=True)
            if chunk.kind == "range" and files == [path]
        ]

    def whole(self) -> list[str]:
        """The files that chunks clone as a whole."""
        pairs = zip(self.plan.chunks, self.files, strict=True)
        return sorted(path for chunk, files in pairs if chunk.kind == "files" for path in files)


class EarlyWorkers:
    """Records the chunks that it gets, and makes none."""

    def __init__(self) -> None:
        self.taken: list[Chunk] = []

    def take(self, chunk: Chunk, number: int, plan: Plan) -> None:
        assert number == len(self.taken)
        self.taken.append(chunk)

    def finish_early(self) -> list[int]:
        return []

    def stop(self) -> None:
        pass


def planned(source: Path, limits: Limits, early: EarlyWorkers | None = None, **options: Any) -> Planned:
    spec = spec_of(source, source.parent / "fork", **options)
    with ExitStack() as stack:
        ends = stack.enter_context(open_endpoints(Roots(), spec.source, spec.destination))
        staging = stack.enter_context(Staging.claim(ends.parent_fd, spec.fork_id, wait=0))
        journal = staging.begin(spec.to_data(), None)
        work = stack.enter_context(open_work(ends, staging, spec.options, staging.make_tree(journal)))
        cloner = Cloner(spec.options, {}, lambda count: None)
        room = Room(work.tree_fd, spec.destination, job_of(staging.fd))
        plan = make_plan(work, limits, cloner, Ticker(never_stop), Report(), room, early)
        room.leave()
        with open(staging.manifest(), "rb") as file:
            files = [
                [
                    f"{block.path}/{entry.name}" if block.path else entry.name
                    for block in manifest.read(file.fileno(), chunk.span)
                    for entry in block.entries
                ]
                for chunk in plan.chunks
            ]
        tree = source.parent / staging.tree_name(journal)
        made = {str(path.relative_to(tree)): path.stat().st_size for path in tree.rglob("*") if path.is_file()}
        staging.discard_tree(journal)
        staging.remove()
    return Planned(plan, files, made)


def make_files(source: Path, directories: int, files: int) -> list[str]:
    paths = []
    for directory in range(directories):
        (source / f"d{directory}").mkdir(parents=True)
        for number in range(files):
            path = f"d{directory}/f{number}"
            (source / path).write_bytes(b"x" * 5000)
            paths.append(path)
    return sorted(paths)


def test_a_small_fork_is_one_inline_chunk(fresh: Fresh) -> None:
    source = fresh("ext4") / "source"
    paths = make_files(source, 3, 4)

    result = planned(source, INLINE)

    assert result.plan.inline
    assert len(result.plan.chunks) == 1
    assert result.whole() == paths
    assert result.plan.entries == 15
    assert result.plan.bytes == 12 * 5000


@pytest.mark.parametrize("chunk_files", [1, 3, 7, 16, 40])
def test_chunks_hold_every_file_exactly_once(fresh: Fresh, chunk_files: int) -> None:
    source = fresh("ext4") / "source"
    paths = make_files(source, 7, 5)

    result = planned(source, Limits(inline_files=0, chunk_files=chunk_files))

    assert not result.plan.inline
    assert result.whole() == paths
    assert len(result.plan.chunks) >= 2  # two children can work at once


@pytest.mark.parametrize("chunk_bytes", [MIB, 3 * MIB, 5 * MIB])
def test_ranges_cover_a_large_file_exactly_and_start_at_whole_mebibytes(fresh: Fresh, chunk_bytes: int) -> None:
    source = fresh("ext4") / "source"
    source.mkdir()
    size = 20 * MIB + 4097
    make_sparse_file(source / "large", size, 12 * MIB)
    make_sparse_file(source / "full", 6 * MIB - 1, 6 * MIB)
    make_sparse_file(source / "small", 4096, 4096)

    result = planned(source, Limits(inline_bytes=0, chunk_bytes=chunk_bytes))

    for name, length in (("large", size), ("full", 6 * MIB - 1)):
        ranges = result.ranges(name)
        assert len(ranges) > 1
        assert ranges[0][0] == 0
        assert ranges[-1][1] == length
        assert [end for _, end in ranges[:-1]] == [start for start, _ in ranges[1:]]
        assert all(start % MIB == 0 and start < end for start, end in ranges)
    assert result.whole() == ["small"]
    assert result.made == {"large": size, "full": 6 * MIB - 1}


@pytest.mark.parametrize("most", [1, 2, 5, 50])
def test_a_fork_of_many_files_stays_within_its_number_of_chunks(fresh: Fresh, most: int) -> None:
    source = fresh("tmpfs") / "source"
    paths = make_files(source, 12, 30)

    result = planned(source, Limits(inline_files=0, chunk_files=1, max_chunks=most))

    assert result.whole() == paths
    assert len(result.plan.chunks) <= most


def test_a_fork_of_many_large_files_stays_within_its_number_of_chunks(fresh: Fresh) -> None:
    source = fresh("tmpfs") / "source"
    source.mkdir()
    for number in range(6):
        make_sparse_file(source / f"large-{number}", 12 * MIB, 8 * MIB, seed=number)

    result = planned(source, Limits(inline_bytes=0, chunk_bytes=MIB, max_chunks=10))

    assert len(result.plan.chunks) <= 10
    for number in range(6):
        name = f"large-{number}"
        ranges = result.ranges(name)
        assert sum(end - start for start, end in ranges) == (12 * MIB if ranges else 0)
        assert result.whole().count(name) == (0 if ranges else 1)


def test_large_files_are_not_split_if_they_can_be_reflinked(fresh: Fresh) -> None:
    source = fresh("xfs") / "source"
    source.mkdir()
    make_sparse_file(source / "large", 8 * MIB, 8 * MIB)
    make_sparse_file(source / "other", 4 * MIB, 4 * MIB)

    result = planned(source, Limits(inline_files=0, chunk_bytes=MIB))

    assert {chunk.kind for chunk in result.plan.chunks} == {"files"}
    assert result.plan.cloned == ("large",)
    assert result.whole() == ["large", "other"]


def test_a_source_of_any_size_is_inline_if_it_can_be_reflinked(fresh: Fresh) -> None:
    source = fresh("xfs") / "source"
    source.mkdir()
    make_sparse_file(source / "large", 8 * MIB, 8 * MIB)

    assert planned(source, Limits(inline_bytes=0)).plan.inline
    assert not planned(source, Limits(inline_bytes=0), reflink="never").plan.inline


def test_an_empty_file_with_blocks_behind_its_end_is_forked_as_an_empty_file(fresh: Fresh) -> None:
    fallocate = require_command("fallocate", "preallocated files")
    directory = fresh("ext4")
    source = directory / "source"
    source.mkdir()
    (source / "reserved").touch()
    subprocess.run([fallocate, "--keep-size", "--length", "4MiB", source / "reserved"], check=True)

    fork_with_ledger(source, directory / "fork", limits=Limits(inline_bytes=0, chunk_bytes=MIB))

    assert_alike(source, directory / "fork")


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_chunks_are_started_during_the_walk(fresh: Fresh, kind: Kind) -> None:
    source = fresh(kind) / "source"
    paths = make_files(source, 12, 30)
    early = EarlyWorkers()

    result = planned(source, Limits(inline_files=20, chunk_files=24), early)

    assert len(early.taken) > 5
    assert result.plan.chunks[: len(early.taken)] == early.taken
    assert result.whole() == paths


@pytest.mark.parametrize("most", [1, 2, 5, 50])
def test_chunks_started_during_the_walk_leave_room_for_the_rest(fresh: Fresh, most: int) -> None:
    source = fresh("tmpfs") / "source"
    paths = make_files(source, 12, 30)
    make_sparse_file(source / "large", 12 * MIB, 8 * MIB)
    limits = Limits(inline_files=0, chunk_files=1, chunk_bytes=MIB, max_chunks=most)

    result = planned(source, limits, EarlyWorkers())

    assert result.whole() == (paths if result.ranges("large") else sorted([*paths, "large"]))
    assert len(result.plan.chunks) <= most


def test_no_byte_is_copied_of_a_source_with_a_fifo(fresh: Fresh) -> None:
    source = fresh("ext4") / "source"
    make_files(source, 12, 30)
    os.mkfifo(source / "d9" / "fifo")
    early = EarlyWorkers()

    with pytest.raises(ForkError) as caught:
        planned(source, Limits(inline_files=20, chunk_files=24), early)

    assert caught.value.code is Code.UNSUPPORTED_FILE_TYPE
    assert early.taken == []
    result = planned(source, Limits(inline_files=20, chunk_files=24), early, skip=("d9/fifo",))
    assert result.plan.entries == 12 * 31 + 1
    assert early.taken != []


def test_a_plan_is_read_back_from_the_journal(fresh: Fresh) -> None:
    source = fresh("ext4") / "source"
    make_files(source, 3, 4)
    make_sparse_file(source / "large", 8 * MIB, 4 * MIB)
    plan = planned(source, Limits(inline_files=0, chunk_files=2, chunk_bytes=MIB)).plan

    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))

    assert again == plan
    assert all(isinstance(chunk, Chunk) for chunk in again.chunks)
    assert again.refused != []


def test_a_message_for_a_plan_does_not_grow_with_the_source(fresh: Fresh) -> None:
    source = fresh("tmpfs") / "source"
    make_files(source, 20, 100)

    plan = planned(source, Limits(inline_files=0, chunk_files=1000)).plan

    assert len(json.dumps(plan.to_data())) < 4096
    assert plan.entries == 2020
