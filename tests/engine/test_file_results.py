"""Every entry has exactly one FileResult, the totals are their sums, and progress ends at 100%."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tasks.copier.staging.control_directory import control_name
from tests.fixtures.filesystems import Fresh
from tests.support.engine.file_results import assert_balanced
from tests.support.engine.forks import CHUNKED, MIB, fork_with_ledger, forked, spec_of
from tests.support.engine.local_campaigns import campaign, destinations
from tests.support.extents import data_extents
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.sources import HUGE, make_everything, make_huge_files, make_images
from tests.support.tree import snapshot


def test_results_of_an_earlier_attempt_are_not_counted(fs: Path, limits: Limits) -> None:
    """The earlier attempt may have had more parts: another worker had other limits, or the source changed."""
    source = make_guest(fs / "source")
    pages = fork_with_ledger(source, fs / "earlier", fork_id="fork-0", limits=CHUNKED).pages

    ledger = fork_with_ledger(source, fs / "fork", limits=limits, earlier={**pages, "99": pages["0"]})

    assert_balanced(ledger, snapshot(source))


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_every_entry_has_exactly_one_result_and_the_totals_are_their_sums(
    fs: Path, limits: Limits, reflink: str
) -> None:
    source = make_everything(fs / "source")

    ledger = fork_with_ledger(source, fs / "fork", limits=limits, reflink=reflink)

    entries = snapshot(source)
    assert_balanced(ledger, entries)
    for path, one in ledger.files.items():
        entry = entries[os.fsencode(path)]
        assert one["type"] == entry.kind
        assert one["seconds"] >= 0
        if one["method"] in ("reflink", "copy"):
            assert one["bytes"] == entry.size
            assert (one["reason"] is None) is (one["method"] == "reflink")
        else:
            assert one["bytes"] == one["copied_bytes"] == 0
        if one["method"] == "skip":
            assert one["reason"] is not None
    assert {os.fsencode(path) for path, one in ledger.files.items() if one["method"] == "skip"} == set(
        SKIPPED_BY_DEFAULT - {b"logs/console.log"}
    )


def test_copied_bytes_are_those_of_the_data_extents(fs: Path, limits: Limits) -> None:
    source = fs / "source"
    source.mkdir()
    make_images(source)

    ledger = fork_with_ledger(source, fs / "fork", limits=limits, reflink="never")

    for path, one in ledger.files.items():
        assert one["copied_bytes"] == sum(
            min(end, one["bytes"]) - start for start, end in data_extents(source / path)
        ), path


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_totals_of_sparse_files_that_exceed_63_bits_together_are_correct(
    fresh: Fresh, limits: Limits, reflink: str
) -> None:
    directory = fresh("xfs")
    source = make_huge_files(directory / "source")

    ledger = fork_with_ledger(source, directory / "fork", limits=limits, reflink=reflink)
    in_children = forked(source, directory / "another", limits=limits, reflink=reflink)
    as_campaign = campaign(source, destinations(directory, 3), reflink=reflink)

    assert_balanced(ledger, snapshot(source))
    assert ledger.result["bytes"]["logical"] == in_children["bytes"]["logical"] == 3 * HUGE
    assert as_campaign["bytes"]["logical"] == 9 * HUGE


def test_entries_with_a_name_of_staging_are_left_out_whatever_their_type(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    names = {kind: control_name(kind) for kind in ("file", "symlink", "directory", "fifo")}
    (source / names["file"]).write_text("data")
    (source / names["symlink"]).symlink_to("state")
    (source / names["directory"]).mkdir()
    os.mkfifo(source / names["fifo"])

    ledger = fork_with_ledger(source, directory / "fork")

    assert ledger.result["status"] == "succeeded"
    for kind, name in names.items():
        one = ledger.files[name]
        assert (one["type"], one["method"]) == (kind, "skip")
        assert "staging" in (one["reason"] or "")
        assert not os.path.lexists(directory / "fork" / name)


def test_results_of_a_fork_with_any_names_are_json(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_everything(directory / os.fsdecode(b"source-\xff"))

    ledger = fork_with_ledger(source, directory / os.fsdecode(b"fork-\xfe"))

    result = json.loads(json.dumps(ledger.result))
    assert os.fsencode(result["source"]) == os.fsencode(source)
    assert os.fsencode(result["destination"]) == os.fsencode(directory / os.fsdecode(b"fork-\xfe"))
    assert os.fsdecode(b"names/not-utf8-\xff\xfe") in ledger.files


def test_a_result_has_times_durations_and_the_labels_of_its_request(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    before = datetime.now(UTC)

    result = forked(source, directory / "fork", limits=limits, fork_id="fork-17")

    started, finished = (datetime.fromisoformat(result[name]) for name in ("started_at", "finished_at"))
    assert before <= started <= finished <= datetime.now(UTC)
    assert result["fork_id"] == "fork-17"
    assert (result["source"], result["destination"]) == (str(source), str(directory / "fork"))
    seconds = result["seconds"]
    assert set(seconds) == {"queued", "plan", "copy", "publish", "total"}
    assert abs(seconds["total"] - seconds["plan"] - seconds["copy"] - seconds["publish"]) < 1e-4
    assert result["labels"] == spec_of(source, source).labels == {}


def test_progress_never_decreases_and_ends_at_100_percent(fs: Path, limits: Limits, every_poll: None) -> None:
    source = make_everything(fs / "source")
    seen: list[Progress] = []

    result = forked(
        source, fs / "fork", limits=limits, reflink="never", poll=lambda progress: seen.append(progress.copy())
    )

    phases = [progress["phase"] for progress in seen]
    assert list(dict.fromkeys(phases)) == ["plan", "copy", "publish"]
    for name in ("files_done", "bytes_done"):
        values = [progress[name] for progress in seen]
        assert values == sorted(values)
    last = seen[-1]
    assert last["files_total"] == result["files"]["total"] == last["files_done"]
    assert last["bytes_total"] == result["bytes"]["logical"] == last["bytes_done"]


def test_a_skipped_directory_counts_as_one_entry(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")

    ledger = fork_with_ledger(source, directory / "fork", limits=limits, skip=("snapshots", "state", "not/there"))

    files = ledger.files
    assert {path: one["reason"] for path, one in files.items() if one["method"] == "skip"} == {
        "logs": "excluded by /logs/",
        "vsock.sock": "excluded by *.sock",
        "firecracker.socket": "socket",
        "snapshots": "skip",
        "state": "skip",
    }
    assert not (directory / "fork" / "snapshots").exists()
    assert not any(path.startswith("snapshots/") for path in files)
    assert (directory / "fork" / "overlay.raw").exists()


def test_a_custom_exclude_replaces_the_default(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")

    forked(source, directory / "fork", limits=limits, exclude=("*.raw", "/snapshots/*/memory"))

    assert set(snapshot(directory / "fork")) == {
        b".",
        b"config.ext4",
        b"config.json",
        b"metadata.json",
        b"state",
        b"logs",
        b"logs/console.log",
        b"snapshots",
        b"snapshots/snapshot-latest",
        b"snapshots/snapshot-latest/memory.lz4.tmp",
    }


def test_a_hard_link_whose_first_name_is_skipped_is_cloned_under_its_second(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("xfs")
    source = directory / "source"
    source.mkdir()
    (source / "a").write_bytes(b"three names")
    os.link(source / "a", source / "b")
    os.link(source / "a", source / "c")

    ledger = fork_with_ledger(source, directory / "fork", limits=limits, skip=("a",))

    assert sorted(one["method"] for one in ledger.files.values()) == ["hardlink", "reflink", "skip"]
    assert (directory / "fork" / "b").samefile(directory / "fork" / "c")
    assert (directory / "fork" / "c").read_bytes() == b"three names"


def test_a_failed_file_has_a_result_with_its_error_and_counts_as_failed(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("ext4")
    source = make_guest(directory / "source")

    ledger = fork_with_ledger(source, directory / "fork", limits=limits, reflink="always")

    assert ledger.result["status"] == "failed"
    assert ledger.result["files"]["failed"] == 1
    (failed,) = [one for one in ledger.files.values() if one["error"] is not None]
    assert failed["error"] == ledger.result["error"]
    assert failed["path"] == "overlay.raw"
    assert ledger.result["files"]["total"] == len(ledger.files)


def test_limits_of_any_size_make_the_same_fork(fresh: Fresh) -> None:
    directory = fresh("ext4")
    source = make_everything(directory / "source")
    totals = []

    for number, limits in enumerate(
        (
            Limits(),
            Limits(inline_files=0, chunk_files=1),
            Limits(inline_bytes=0, chunk_bytes=1),
            Limits(inline_bytes=0, chunk_bytes=MIB // 2, max_chunks=3),
            Limits(inline_files=0, chunk_files=10**9, chunk_bytes=10**15),
        )
    ):
        ledger = fork_with_ledger(source, directory / f"fork-{number}", fork_id=f"fork-{number}", limits=limits)
        assert_balanced(ledger, snapshot(source))
        totals.append((ledger.result["files"], ledger.result["bytes"]))

    assert totals == [totals[0]] * len(totals)
