"""One fork, as a scheduler sees it: its result, its states, its pages, its keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.store import keys
from tasks.store.keys import Lifetime
from tests.fixtures.filesystems import Fresh, make_subvolume
from tests.support.extents import allocated_bytes, sharing
from tests.support.guests import MIB, make_guest, make_sparse_file
from tests.support.redis_keys import kind_of
from tests.support.system.result_checks import check_file_results, check_fork_result, entries_of
from tests.support.system.scheduler import Scheduler, states
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, spin_until
from tests.support.tree import snapshot

#: The entries of a `make_guest` guest that are skipped, and why; the entries of `logs` are not walked.
SKIPPED = {
    "logs": "excluded by /logs/",
    "vsock.sock": "excluded by *.sock",
    "firecracker.socket": "socket",
    "snapshots/snapshot-latest/memory.lz4.tmp": "excluded by *.lz4.tmp",
}


def _without_skipped(directory: Path) -> dict[bytes, object]:
    skipped = {os.fsencode(path) for path in SKIPPED} | {b"logs/console.log"}
    return {path: entry for path, entry in snapshot(directory).items() if path not in skipped}


def test_guest_on_xfs_is_reflinked_and_its_result_has_every_field_of_the_contract(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given
    directory = fresh("xfs")
    source = make_guest(directory / "a")
    os.link(source / "state", source / "state.again")
    (source / "current").symlink_to("snapshots/snapshot-latest")
    before = datetime.now(UTC)

    # When
    labels = {"tenant": "blue", "": "empty", "ключ": "значение"}
    result = scheduler.fork(source, directory / "b", "fork-17", labels=labels)

    # Then
    check_fork_result(result)
    assert result["fork_id"] == "fork-17"
    assert (result["status"], result["error"], result["fallback"]) == ("succeeded", None, None)
    assert (result["source"], result["destination"]) == (str(source), str(directory / "b"))
    assert result["labels"] == labels
    started, finished = (datetime.fromisoformat(result[name]) for name in ("started_at", "finished_at"))
    assert before - timedelta(milliseconds=1) <= started <= finished <= datetime.now(UTC)
    assert result["files"] == {
        "total": 14,
        "reflinked": 6,
        "copied": 0,
        "hardlinked": 1,
        "symlinked": 1,
        "directories": 2,
        "skipped": 4,
        "failed": 0,
    }
    logical = sum(path.stat().st_size for path in (directory / "b").rglob("*") if path.is_file())
    logical -= (source / "state").stat().st_size  # a hard link has no bytes of its own
    assert result["bytes"] == {"logical": logical, "reflinked": logical, "copied": 0}

    # and there is one FileResult for each entry, and they add up to the totals
    files = scheduler.files("fork-17")
    check_file_results(result, files)
    assert {file["path"] for file in files} == entries_of(source) - {"logs/console.log"}
    assert {file["path"]: file["reason"] for file in files if file["method"] == "skip"} == SKIPPED
    assert {file["type"] for file in files} == {"file", "directory", "symlink", "socket"}
    assert all(file["error"] is None for file in files)

    # and the fork equals the source, with every extent shared
    fork, original = _without_skipped(directory / "b"), _without_skipped(source)
    fork.pop(b".")
    original.pop(b".")
    assert fork == original
    assert (directory / "b").stat().st_mode == source.stat().st_mode
    for name in ("overlay.raw", "snapshots/snapshot-latest/memory", "config.ext4"):
        assert sharing(directory / "b" / name).whole
    system.assert_left_nothing_in(directory)


def test_subvolume_is_forked_by_one_snapshot(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_guest(make_subvolume(directory / "a"))

    result = scheduler.fork(source, directory / "b", "fork-18", verify="content", durability="sync")

    check_fork_result(result)
    check_file_results(result, scheduler.files("fork-18"))
    assert (result["status"], result["subvolume"]) == ("succeeded", True)
    assert {file["method"] for file in scheduler.files("fork-18")} == {"snapshot", "mkdir", "skip"}
    assert (directory / "b").stat().st_ino == source.stat().st_ino == 256
    assert _without_skipped(directory / "b") == _without_skipped(source)
    assert scheduler.fork(source, directory / "b", "fork-18", verify="content", durability="sync") == result
    system.assert_left_nothing_in(directory)


def test_empty_source_succeeds(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    (directory / "a").mkdir()

    result = scheduler.fork(directory / "a", directory / "b")

    check_fork_result(result)
    check_file_results(result, scheduler.files(result["fork_id"]))
    assert (result["status"], result["files"]["total"]) == ("succeeded", 0)
    assert list((directory / "b").iterdir()) == []
    system.assert_left_nothing_in(directory)


def test_states_of_a_large_fork_are_started_then_progress_then_success(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    seen: list[str] = []

    def poll() -> bool:
        state = str(scheduler.results.states.get("fork-states")["status"])
        if not seen or seen[-1] != state:
            seen.append(state)
        return state == "SUCCESS"

    with scheduler.watching("fork-states") as records:
        sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "fork-states")
        spin_until(poll, "the end", 40)
        result = scheduler.wait(sent)

    # Then each state occurs in order
    assert [state for state in seen if state != "PENDING"] == ["STARTED", "PROGRESS", "SUCCESS"]
    assert states(records)[-2:] == ["PROGRESS", "SUCCESS"]
    assert records[-1]["result"] == result
    progress = [record["result"] for record in records if record["status"] == "PROGRESS"]
    for report in progress:
        assert set(report) == {"files_done", "files_total", "bytes_done", "bytes_total", "phase"}
        assert report["phase"] in ("plan", "copy", "publish")
        assert 0 <= report["files_done"] <= report["files_total"] <= result["files"]["total"]
        assert 0 <= report["bytes_done"] <= report["bytes_total"] <= result["bytes"]["logical"]
        if report["phase"] != "plan":  # before that they are what the walk has found so far
            assert report["files_total"] == result["files"]["total"]
            assert report["bytes_total"] == result["bytes"]["logical"]
    # and progress advances
    done = [report["bytes_done"] for report in progress if report["phase"] == "copy"]
    assert done == sorted(done)
    assert len(set(done)) > 1
    system.assert_left_nothing_in(workdir)


def test_pages_are_readable_while_a_large_fork_runs(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "fork-pages")

    early = spin_until(lambda: scheduler.files("fork-pages"), "results of files")
    state = scheduler.results.states.get("fork-pages")["status"]

    assert state in ("STARTED", "PROGRESS")
    result = scheduler.wait(sent)
    files = scheduler.files("fork-pages")
    assert 0 < len(early) < len(files)
    assert all(file in files for file in early)
    check_file_results(result, files)
    system.assert_left_nothing_in(workdir)


def test_pages_are_read_from_redis_as_documented(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    result = scheduler.fork(large_source, workdir / "b", "fork-raw")
    campaign = {"source": str(large_source), "destinations": [str(workdir / "c")]}
    scheduler.app.send_task("forkvm.campaign", args=[campaign], task_id="campaign-raw", queue="forkvm").get(timeout=40)

    # Then a chunked fork has pages of several parts, and its totals are the sums of its FileResults
    files = _files_by_the_readme(scheduler.redis, "fork-raw")
    assert len(scheduler.redis.hkeys("forkvm:fork-raw:pages")) > 1
    check_file_results(result, files)
    assert files == scheduler.files("fork-raw")
    # and so does a fork of a campaign
    assert {file["path"] for file in _files_by_the_readme(scheduler.redis, "campaign-raw.1")} == {
        file["path"] for file in files
    }
    system.assert_left_nothing_in(workdir)


def _files_by_the_readme(server: Any, fork_id: str) -> list[Any]:
    """The FileResults of a fork, as a client in any language reads them."""
    counts = {part.decode(): int(count) for part, count in server.hgetall(f"forkvm:{fork_id}:pages").items()}
    parts = ["plan", *sorted(filter(str.isdigit, counts), key=int), "close"]
    keys = [f"forkvm:{fork_id}:page:{part}:{n}" for part in parts for n in range(counts.get(part, 0))]
    pages = [server.get(key) for key in keys or [f"forkvm:{fork_id}:page"]]
    return [file for page in pages for file in json.loads(zlib.decompress(page))]


def test_every_key_of_a_fork_has_the_configured_ttl(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    scheduler.fork(large_source, workdir / "b", "fork-ttl")

    scheduler.wait_quiet()
    found = {
        key.decode(): scheduler.redis.ttl(key)
        for pattern in ("forkvm:fork-ttl:*", "celery-task-meta-fork-ttl")
        for key in scheduler.redis.scan_iter(pattern)
    }
    of_job = {key: ttl for key, ttl in found.items() if kind_of(key).lifetime is Lifetime.JOB}
    assert {kind_of(key) for key in of_job} >= {keys.CLAIM, keys.RESULT, keys.PAGES, keys.PART_PAGE, keys.STATE}
    assert {key: ttl for key, ttl in of_job.items() if not 86_400 - 60 < ttl <= 86_400} == {}
    assert {key: ttl for key, ttl in found.items() if not 0 < ttl <= keys.OPEN_SECONDS} == {}


def test_destination_appears_complete(system: System, scheduler: Scheduler, large_source: Path, workdir: Path) -> None:
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")})

    spin_until(lambda: (workdir / "b").exists(), "the destination")

    assert _sizes(workdir / "b") == _sizes(large_source)
    scheduler.wait(sent)
    system.assert_left_nothing_in(workdir)


def test_no_other_user_can_enter_a_fork_before_it_is_published(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "fork-private")

    staging = StagingView(workdir, "fork-private")
    spin_until(lambda: staging.phase == "cloning", "chunks")
    modes = {path.name: path.stat().st_mode & 0o777 for path in workdir.glob(".forkvm-*")}

    assert set(modes.values()) == {0o700}
    assert len(modes) == 2
    scheduler.wait(sent)
    system.assert_left_nothing_in(workdir)


def _sizes(directory: Path) -> dict[str, int]:
    files = (Path(parent) / name for parent, _, names in os.walk(directory) for name in names)
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


@pytest.mark.parametrize("durability", ["none", "sync"])
@pytest.mark.parametrize("verify", ["none", "content"])
def test_options_of_the_contract_are_applied(
    system: System, scheduler: Scheduler, fresh: Fresh, durability: str, verify: str
) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "a")

    result = scheduler.fork(
        source,
        directory / "b",
        reflink="never",
        skip=["state", "snapshots/snapshot-latest"],
        exclude=["*.json"],
        preserve=["mode"],
        durability=durability,
        verify=verify,
        labels=["one", "two"],
    )

    assert (result["files"]["reflinked"], result["fallback"], result["labels"]) == (0, None, ["one", "two"])
    files = {file["path"]: file for file in scheduler.files(result["fork_id"])}
    assert files["overlay.raw"]["method"] == "copy"
    assert files["overlay.raw"]["reason"] == "reflink=never"
    assert {path for path, file in files.items() if file["method"] == "skip"} == {
        "state",
        "snapshots/snapshot-latest",
        "config.json",
        "metadata.json",
        "vsock.sock",
        "firecracker.socket",
    }
    assert (directory / "b" / "logs" / "console.log").read_text() == "booted\n"
    assert sharing(directory / "b" / "overlay.raw").shared == 0
    assert allocated_bytes(directory / "b" / "overlay.raw") <= allocated_bytes(source / "overlay.raw") + MIB
    system.assert_left_nothing_in(directory)


def test_refused_reflink_is_reported_once_for_the_fork_and_for_each_file(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs_noreflink")
    source = make_guest(directory / "a")

    result = scheduler.fork(source, directory / "b")

    fallback = result["fallback"]
    assert fallback is not None
    assert (fallback["errno"], fallback["path"]) == (95, "overlay.raw")
    assert fallback["reason"].startswith("EOPNOTSUPP: ")
    files = [file for file in scheduler.files(result["fork_id"]) if file["method"] == "copy"]
    assert len(files) == result["files"]["copied"] == 6
    assert all((file["reason"] or "").startswith("EOPNOTSUPP: ") for file in files)
    system.assert_left_nothing_in(directory)


def test_names_that_are_not_utf8_go_through_requests_and_results_without_loss(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given
    directory = fresh("xfs")
    source, destination = directory / os.fsdecode(b"a-\xff"), directory / os.fsdecode(b"b-\xfe\xfd")
    source.mkdir()
    names = [os.fsdecode(b"disk-\x80\xff"), "ключ", 'quote"back\\slash', "line\nbreak", "\x7f\x01"]
    for name in names:
        (source / name).write_text(name, errors="surrogateescape")

    # When
    result = scheduler.fork(source, destination, skip=[names[2]], labels={names[0]: names[0], "lone": "\ud800"})

    # Then
    assert (result["source"], result["destination"]) == (str(source), str(destination))
    assert result["labels"] == {names[0]: names[0], "lone": "\ud800"}
    files = scheduler.files(result["fork_id"])
    assert {file["path"] for file in files} == set(names)
    assert sorted(os.listdir(os.fsencode(destination))) == sorted(os.fsencode(n) for n in names if n != names[2])
    # and Redis contains plain ASCII JSON for any client
    stored = scheduler.redis.get(f"celery-task-meta-{result['fork_id']}")
    assert isinstance(stored, bytes)
    assert json.loads(stored.decode("ascii"))["result"] == result
    system.assert_left_nothing_in(directory)


def test_failure_with_a_name_that_is_not_utf8_reports_the_path(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    source = directory / os.fsdecode(b"missing-\xff")

    sent = scheduler.send({"source": str(source), "destination": str(directory / "b")})
    message, result = scheduler.wait_failed(sent)

    assert message.startswith(f"source_not_found: {source}: ")
    error = result["error"]
    assert error is not None
    assert error["path"] == str(source)
    system.assert_left_nothing_in(directory)


def test_name_of_255_bytes_is_forked_from_and_to(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    source, destination = directory / ("a" * 255), directory / ("ä" * 127 + "b")
    source.mkdir()
    make_sparse_file(source / ("f" * 255), MIB, MIB)

    result = scheduler.fork(source, destination)

    assert result["status"] == "succeeded"
    assert snapshot(destination)[b"f" * 255] == snapshot(source)[b"f" * 255]
    system.assert_left_nothing_in(directory)


def test_client_in_another_program_needs_none_of_our_modules(system: System, fresh: Fresh) -> None:
    """The example of the contract, run where none of our modules can be imported."""
    directory = fresh("xfs")
    make_guest(directory / "a")
    program = """
import sys
from celery import Celery
url, source, good, bad = sys.argv[1:]
app = Celery(broker=url, backend=url)
def send(to):
    request = {"source": source, "destination": to}
    return app.send_task("forkvm.fork", kwargs={"request": request}, queue="forkvm")
print(send(good).get(timeout=30)["status"])
try:
    send(bad).get(timeout=30)
except Exception as error:
    print(type(error).__name__, error)
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("tasks", "worker")))
"""

    done = subprocess.run(
        [sys.executable, "-c", program, system.server.broker_url, str(directory / "a"), str(directory / "b"), "b"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    status, failure, modules = done.stdout.splitlines()
    assert status == "succeeded"
    assert failure == "ForkFailed invalid_request: b: destination: the path is not absolute; begin it with '/'"
    assert modules == "[]"
    system.assert_left_nothing_in(directory)
