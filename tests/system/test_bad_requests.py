"""Bad input: each row fails with its own code and path and leaves nothing, and the worker serves the next job."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh, SmallTmpfs
from tests.fixtures.processes import PublicProgram, Worker, program_environment
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import MIB, GuestSizes, make_guest, make_sparse_file
from tests.support.outcome import LOGS
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, stopped_in_the_middle
from tests.support.tree import snapshot

#: A small guest: most of these requests fail before its data is read.
SIZES = GuestSizes(overlay=8 * MIB, overlay_data=MIB, memory=4 * MIB, memory_data=MIB, config=MIB // 4)


@dataclass(frozen=True)
class Row:
    """One bad request, made in a directory with a valid source `a`; `error_path` is the path in the error."""

    code: str
    source: str = "{dir}/a"
    destination: str = "{dir}/b"
    error_path: str = "{dir}/b"
    errno: int | None = None
    prepare: Callable[[Path], object] = lambda directory: None
    fields: dict[str, Any] = field(default_factory=dict)


def _symlink_out(directory: Path) -> None:
    (directory / "out").symlink_to("/usr")


def _mknod(directory: Path) -> None:
    os.mknod(directory / "a" / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))


ROWS = {
    "a missing source": Row("source_not_found", source="{dir}/missing", error_path="{dir}/missing", errno=errno.ENOENT),
    "a file as source": Row(
        "source_not_directory", source="{dir}/a/state", error_path="{dir}/a/state", errno=errno.ENOTDIR
    ),
    "a path through a file": Row(
        "source_not_directory", source="{dir}/a/state/c", error_path="{dir}/a/state/c", errno=errno.ENOTDIR
    ),
    "a relative source": Row("invalid_request", source="a", error_path="a"),
    "a relative destination": Row("invalid_request", destination="b", error_path="b"),
    "an empty source path": Row("invalid_request", source="", error_path=""),
    "an empty destination path": Row("invalid_request", destination="", error_path=""),
    "'..' in the source": Row("invalid_request", source="{dir}/c/../a", error_path="{dir}/c/../a"),
    "'..' in the destination": Row("invalid_request", destination="{dir}/../b", error_path="{dir}/../b"),
    "a NUL in a path": Row("invalid_request", destination="{dir}/b\0c", error_path="{dir}/b\0c"),
    "a surrogate that encodes no byte": Row("invalid_request", source="{dir}/\ud800", error_path="{dir}/\ud800"),
    "a source outside the roots": Row("outside_roots", source="/usr", error_path="/usr"),
    "a destination outside the roots": Row("outside_roots", destination="/usr/b", error_path="/usr/b"),
    "a source that only begins like the root": Row("outside_roots", source="{root}x/a", error_path="{root}x/a"),
    "the root's parent as destination": Row("outside_roots", destination="/b", error_path="/b"),
    "the file system's root as destination": Row("outside_roots", destination="/", error_path="/"),
    "a symlink out of the roots as source": Row(
        "outside_roots", source="{dir}/out", error_path="{dir}/out", prepare=_symlink_out, errno=errno.EXDEV
    ),
    "a way out through a symlink in the source": Row(
        "outside_roots", source="{dir}/out/bin", error_path="{dir}/out/bin", prepare=_symlink_out, errno=errno.EXDEV
    ),
    "a way out through a symlink in the destination": Row(
        "outside_roots", destination="{dir}/out/b", error_path="{dir}/out/b", prepare=_symlink_out, errno=errno.EXDEV
    ),
    "an empty directory at the destination": Row(
        "destination_exists", prepare=lambda d: (d / "b").mkdir(), errno=errno.EEXIST
    ),
    "a full directory at the destination": Row(
        "destination_exists", prepare=lambda d: make_guest(d / "b", SIZES, seed=1), errno=errno.EEXIST
    ),
    "a file at the destination": Row(
        "destination_exists", prepare=lambda d: (d / "b").write_text("mine"), errno=errno.EEXIST
    ),
    "a dangling symlink at the destination": Row(
        "destination_exists", prepare=lambda d: (d / "b").symlink_to("nowhere"), errno=errno.EEXIST
    ),
    "the root itself as destination": Row(
        "destination_exists", destination="{root}", error_path="{root}", errno=errno.EEXIST
    ),
    "the source as destination": Row(
        "destination_exists", destination="{dir}/a", error_path="{dir}/a", errno=errno.EEXIST
    ),
    "a destination inside the source": Row(
        "destination_inside_source", destination="{dir}/a/snapshots/b", error_path="{dir}/a/snapshots/b"
    ),
    "a destination inside the source through a symlink": Row(
        "destination_inside_source",
        destination="{dir}/inner/b",
        error_path="{dir}/inner/b",
        prepare=lambda d: (d / "inner").symlink_to("a/snapshots"),
    ),
    "the source inside the destination": Row(
        "destination_exists", destination="{dir}", error_path="{dir}", errno=errno.EEXIST
    ),
    "no parent of the destination": Row(
        "invalid_request", destination="{dir}/c/b", error_path="{dir}/c/b", errno=errno.ENOENT
    ),
    "a file as parent of the destination": Row(
        "invalid_request", destination="{dir}/a/state/b", error_path="{dir}/a/state/b", errno=errno.ENOTDIR
    ),
    "a FIFO in the source": Row(
        "unsupported_file_type",
        error_path="{dir}/a/snapshots/fifo",
        prepare=lambda d: os.mkfifo(d / "a" / "snapshots" / "fifo"),
    ),
    "a device in the source": Row("unsupported_file_type", error_path="{dir}/a/null", prepare=_mknod),
    "reflink=always across filesystems": Row(
        "reflink_unsupported",
        destination="{other}/b",
        error_path="{dir}/a/overlay.raw",
        fields={"reflink": "always"},
        errno=errno.EXDEV,
    ),
    "an unknown field": Row("invalid_request", error_path="{dir}/a", fields={"colour": "blue"}),
    "a wrong word": Row("invalid_request", error_path="{dir}/a", fields={"reflink": "sometimes"}),
    "a wrong type": Row("invalid_request", error_path="{dir}/a", fields={"skip": "state"}),
    "a wrong type in a list": Row("invalid_request", error_path="{dir}/a", fields={"exclude": ["*.sock", 7]}),
    "a null": Row("invalid_request", error_path="{dir}/a", fields={"durability": None}),
    "a boolean": Row("invalid_request", error_path="{dir}/a", fields={"verify": True}),
    "an unknown name in preserve": Row("invalid_request", error_path="{dir}/a", fields={"preserve": ["mode", "all"]}),
    "labels that are not strings": Row("invalid_request", error_path="{dir}/a", fields={"labels": {"n": 1}}),
    "a skip that climbs out": Row("invalid_request", error_path="{dir}/a", fields={"skip": ["../a"]}),
    "a name of 256 bytes at the destination": Row(
        "invalid_request",
        destination="{dir}/" + "b" * 256,
        error_path="{dir}/" + "b" * 256,
        errno=errno.ENAMETOOLONG,
    ),
    "a name of 256 bytes in the source path": Row(
        "invalid_request", source="{dir}/" + "a" * 256, error_path="{dir}/" + "a" * 256, errno=errno.ENAMETOOLONG
    ),
    "a source path of more than 4096 bytes": Row(
        "invalid_request", source="{dir}" + "/abc" * 1100, error_path="{dir}" + "/abc" * 1100
    ),
    "a destination path of more than 4096 bytes": Row(
        "invalid_request", destination="{dir}" + "/abc" * 1100, error_path="{dir}" + "/abc" * 1100
    ),
}


def _entries(directory: Path) -> dict[bytes, object]:
    """All entries below a directory. Its own times may change, since staging was created and removed in it."""
    return {path: entry for path, entry in snapshot(directory).items() if path != b"."}


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
def test_bad_request_ends_with_its_code_and_path_and_leaves_nothing(
    system: System, scheduler: Scheduler, fresh: Fresh, mounts: Path, row: Row
) -> None:
    # Given
    directory, other = fresh("xfs"), fresh("ext4")
    words = {"dir": str(directory), "other": str(other), "root": str(mounts)}

    def filled(text: str) -> str:
        for word, value in words.items():
            text = text.replace("{" + word + "}", value)
        return text

    make_guest(directory / "a", SIZES)
    row.prepare(directory)
    before = _entries(directory)

    # When
    labels = {"tenant": "blue"}
    request = {"source": filled(row.source), "destination": filled(row.destination), "labels": labels, **row.fields}
    message, result = scheduler.wait_failed(scheduler.send(request))

    # Then
    check_fork_result(result)
    error = result["error"]
    assert error is not None
    assert (error["code"], error["path"], error["errno"]) == (row.code, filled(row.error_path), row.errno)
    assert message.startswith(": ".join(filter(None, (row.code, filled(row.error_path), error["message"]))))
    assert (result["source"], result["destination"]) == (request["source"], request["destination"])
    assert result["status"] == "failed"
    check_file_results(result, scheduler.files(result["fork_id"]))
    assert _entries(directory) == before
    assert list(other.iterdir()) == []
    system.assert_left_nothing_in(directory, other)

    # and the worker is ready for the next job
    (directory / "good").mkdir()
    (directory / "good" / "state").write_text("paused")
    assert scheduler.fork(directory / "good", directory / "next")["files"]["reflinked"] == 1


def test_message_of_an_invalid_field_names_the_field(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    fields = {"colour": "blue", "reflink": "sometimes", "skip": [1], "labels": {"a": None}}

    message, _ = scheduler.wait_failed(
        scheduler.send({"source": str(directory), "destination": str(directory / "b"), **fields})
    )

    assert all(f"{name}" in message for name in fields)
    assert "pydantic" not in message


@pytest.mark.parametrize("labels", [{"tenant": "blue", "ключ": "\udcff"}, ["one", "two"]], ids=["mapping", "list"])
@pytest.mark.parametrize("what", ["a missing source", "a destination that exists"])
def test_labels_are_echoed_in_the_result_of_a_fork_that_failed(
    system: System, scheduler: Scheduler, fresh: Fresh, labels: object, what: str
) -> None:
    directory = fresh("xfs")
    (directory / "b").mkdir()
    if what != "a missing source":
        (directory / "a").mkdir()

    request = {"source": str(directory / "a"), "destination": str(directory / "b"), "labels": labels}
    _, result = scheduler.wait_failed(scheduler.send(request))

    assert result["labels"] == labels


@pytest.mark.parametrize(
    "request_",
    [None, "text", 7, 1.5, True, [], [{"source": "/a"}], {}, {"source": "/a"}, {"source": 1, "destination": {}}],
    ids=repr,
)
def test_request_that_is_no_object_or_incomplete_is_an_invalid_request(
    system: System, scheduler: Scheduler, request_: object
) -> None:
    message, result = scheduler.wait_failed(scheduler.send(request_))

    check_fork_result(result)
    assert message.startswith("invalid_request: ")
    assert result["error"] is not None
    assert result["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param([], {}, id="none"),
        pytest.param([], {"req": {}}, id="another name"),
        pytest.param([{"source": "/a", "destination": "/b"}, 1], {}, id="one more"),
        pytest.param([], {"request": {"source": "/a", "destination": "/b"}, "priority": 1}, id="one more by name"),
        pytest.param([], {"source": "/a", "destination": "/b"}, id="fields instead of a request"),
        pytest.param([{"source": "/a", "destination": "/b"}], {"request": {}}, id="the request twice"),
    ],
)
def test_wrong_arguments_are_an_invalid_request(
    system: System, scheduler: Scheduler, args: list[Any], kwargs: dict[str, Any]
) -> None:
    message, result = scheduler.wait_failed(scheduler.send_call(args=args, kwargs=kwargs))

    check_fork_result(result)
    assert message.startswith("invalid_request: ")


def test_request_may_come_as_the_one_positional_argument(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    (directory / "a").mkdir()
    request = {"source": str(directory / "a"), "destination": str(directory / "b")}

    assert scheduler.wait(scheduler.send_call(args=[request]))["status"] == "succeeded"
    system.assert_left_nothing_in(directory)


def test_full_destination_is_no_space_and_leaves_nothing(
    system: System, scheduler: Scheduler, fresh: Fresh, small_tmpfs: SmallTmpfs
) -> None:
    source = make_guest(fresh("xfs") / "a")  # inline
    large = fresh("ext4") / "a"  # in ranges
    large.mkdir()
    make_sparse_file(large / "disk.raw", 64 * MIB, 24 * MIB)
    for guest in (source, large):
        full = small_tmpfs(4 * MIB)

        message, result = scheduler.wait_failed(
            scheduler.send({"source": str(guest), "destination": str(full / "b"), "exclude": []})
        )

        assert message.startswith("no_space: ")
        error = result["error"]
        assert error is not None
        assert error["errno"] == errno.ENOSPC
        assert error["path"].startswith(str(full / "b"))
        assert result["files"]["failed"] <= 2
        check_file_results(result, scheduler.files(result["fork_id"]))
        system.assert_left_nothing_in(full)
        assert list(full.iterdir()) == []


def test_source_that_is_open_for_writing_is_refused_on_request(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a", SIZES)
    request = {"source": str(directory / "a"), "destination": str(directory / "b"), "source_open": "refuse"}

    with (directory / "a" / "overlay.raw").open("r+b"):
        message, result = scheduler.wait_failed(scheduler.send(request))

    check_fork_result(result)
    assert message.startswith(f"source_in_use: {directory}/a/overlay.raw: ")
    system.assert_left_nothing_in(directory)
    assert scheduler.wait(scheduler.send(request))["status"] == "succeeded"


def _write(disk: Path) -> None:
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), b"changed", 0)


def _replace(disk: Path) -> None:
    (disk.parent / "new").write_bytes(disk.read_bytes())
    (disk.parent / "new").rename(disk)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_write, id="written to"),
        pytest.param(lambda disk: os.truncate(disk, MIB), id="truncated"),
        pytest.param(lambda disk: os.truncate(disk, 256 * MIB), id="extended"),
        pytest.param(lambda disk: disk.unlink(), id="removed"),
        pytest.param(_replace, id="replaced"),
        pytest.param(lambda disk: (disk.parent / "added").touch(), id="given a sibling"),
        pytest.param(lambda disk: disk.parent.rename(disk.parent.parent / "moved"), id="moved with its directory"),
    ],
)
def test_source_that_changes_while_it_is_cloned_is_source_changed(
    system: System, scheduler: Scheduler, fresh: Fresh, change: Callable[[Path], object]
) -> None:
    # Given a half-done fork that has not copied its disk yet
    directory = fresh("xfs_noreflink")
    source = directory / "a"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 128 * MIB, 100 * MIB)
    fork_id = f"changing-{os.urandom(4).hex()}"
    sent = scheduler.send({"source": str(source), "destination": str(directory / "b")}, fork_id)

    # When
    with stopped_in_the_middle(system.worker, StagingView(directory, fork_id)):
        change(source / "disk.raw")

    # Then
    message, result = scheduler.wait_failed(sent)
    assert message.startswith(f"source_changed: {source}")
    assert result["error"] is not None
    assert result["error"]["code"] == "source_changed"
    check_file_results(result, scheduler.files(fork_id))
    assert not (directory / "b").exists()
    system.assert_left_nothing_in(directory)


def test_destination_created_while_the_fork_runs_is_not_changed(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "overtaken")
    with stopped_in_the_middle(system.worker, StagingView(workdir, "overtaken")):
        (workdir / "b").mkdir()
        (workdir / "b" / "mine").write_text("mine")

    message, result = scheduler.wait_failed(sent)

    assert message.startswith(f"destination_exists: {workdir / 'b'}: ")
    check_file_results(result, scheduler.files("overtaken"))
    assert [path.name for path in (workdir / "b").iterdir()] == ["mine"]
    system.assert_left_nothing_in(workdir)


def test_sockets_of_running_machines_do_not_fail_a_fork(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "a", SIZES)
    with socket.socket(socket.AF_UNIX) as listener:
        # Given a socket with a listener; its path is relative to the directory, since sun_path is short
        fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
        listener.bind(f"/proc/self/fd/{fd}/api.socket")
        os.close(fd)
        listener.listen()

        result = scheduler.fork(source, directory / "b")

    assert result["files"]["skipped"] == 5
    system.assert_left_nothing_in(directory)


@pytest.fixture
def worker_of_nobody(
    redis_server: RedisServer,
    public_program: PublicProgram,
    mounts: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Iterator[Worker]:
    """A worker that runs as an ordinary user."""
    log = tmp_path / "worker-of-nobody.log"
    request.node.stash[LOGS].append(log)
    line = [public_program.command[0], "-m", "celery", "-A", "worker.app", "worker", "-Q", "forkvm"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*line, "--loglevel", "INFO", "--concurrency", "1"],
            cwd=public_program.directory,
            env=program_environment(redis_server, mounts) | public_program.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=65534,
            group=65534,
            extra_groups=[],
        )
    worker = Worker(process, log)
    try:
        worker.wait_until_ready()
        yield worker
    finally:
        worker.end()


def test_operations_that_the_workers_user_may_not_do_are_permission_denied(
    worker_of_nobody: Worker, own_scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given a worker that does not run as root
    scheduler = own_scheduler
    system = System(scheduler.server, worker_of_nobody, scheduler)
    directory = fresh("xfs")
    source = make_guest(directory / "a", SIZES)
    for path in [directory, source, *source.rglob("*")]:
        os.chown(path, 65534, 65534, follow_symlinks=False)

    def denied(path: Path, destination: Path = directory / "b") -> None:
        message, result = scheduler.wait_failed(
            scheduler.send({"source": str(source), "destination": str(destination)})
        )
        assert message.startswith(f"permission_denied: {path}: "), message
        assert result["error"] is not None
        assert result["error"]["errno"] == errno.EACCES
        check_file_results(result, scheduler.files(result["fork_id"]))
        system.assert_left_nothing_in(directory)
        assert not (directory / "b").exists()

    # When a file, a directory, the source itself, or the destination's parent is not accessible to it
    os.chown(source / "config.ext4", 0, 0)
    (source / "config.ext4").chmod(0o600)
    denied(source / "config.ext4")
    os.chown(source / "config.ext4", 65534, 65534)

    os.chown(source / "snapshots", 0, 0)
    (source / "snapshots").chmod(0o700)
    denied(source / "snapshots")
    os.chown(source / "snapshots", 65534, 65534)

    os.chown(source, 0, 0)
    source.chmod(0o700)
    denied(source)
    os.chown(source, 65534, 65534)

    (directory / "closed").mkdir(mode=0o700)
    denied(directory / "closed" / "b", directory / "closed" / "b")

    (directory / "read-only").mkdir(mode=0o755)
    denied(directory / "read-only" / "b", directory / "read-only" / "b")

    # Then it serves a request that it may
    assert scheduler.fork(source, directory / "b")["status"] == "succeeded"
    assert (directory / "b" / "config.ext4").stat().st_uid == 65534
    scheduler.wait_quiet()
