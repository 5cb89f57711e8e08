"""Each errno that the kernel may return, injected into the real calls, is handled as the design says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tasks.copier.kernel.reflink import Answer
from tests.fixtures.filesystems import Fresh, Kind
from tests.support.engine.forks import assert_alike, forked, leftovers
from tests.support.engine.forks import fork as fork_again
from tests.support.engine.reflink_errnos import ERRNOS_OF_ANSWERS
from tests.support.engine.traced_forks import Traced, control, in_tree, trace_fork
from tests.support.guests import MIB, make_sparse_file
from tests.support.requirements import require_command

FILES = ("a", "b", "c")
FICLONE = "FICLONE"


@pytest.fixture(scope="session")
def strace() -> str:
    return require_command("strace", "the injection of errors")


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    """Three files; `c` is the largest, so it is the first one to be reflinked."""
    source = directory / "source"
    source.mkdir()
    for number, name in enumerate(FILES):
        make_sparse_file(source / name, (number + 1) * MIB + 5, MIB // 2, seed=number)
    return source


def assert_failed(traced: Traced, directory: Path, code: str, name: str) -> None:
    assert traced.result is not None
    error = traced.result["error"]
    assert error is not None
    assert error["code"] == code
    assert error["errno"] == getattr(errno, name)
    assert leftovers(directory) == []
    assert sorted(path.name for path in directory.iterdir()) == ["source"]
    forked(directory / "source", directory / "fork")
    assert_alike(directory / "source", directory / "fork")


def methods(traced: Traced) -> dict[str, str]:
    return {path: one["method"] for path, one in traced.files.items()}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ERRNOS_OF_ANSWERS[Answer.PAIR_CANNOT])
def test_a_refusal_for_the_pair_of_filesystems_is_remembered_for_the_fork(
    strace: str, directory: Path, source: Path, name: str, chunked: bool
) -> None:
    fork = directory / "fork"

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="ioctl",
        inject=[f"ioctl:error={name}"],
        paths=[in_tree(fork, file) for file in FILES],
        chunked=chunked,
    )

    assert_alike(source, fork)
    assert methods(traced) == dict.fromkeys(FILES, "copy")
    assert traced.calls(FICLONE) == 1
    assert traced.result is not None
    assert traced.result["fallback"] is not None
    assert traced.result["fallback"]["errno"] == getattr(errno, name)
    assert traced.result["fallback"]["path"] == "c"


@pytest.mark.parametrize("file", ["c", "a"])
@pytest.mark.parametrize("name", ERRNOS_OF_ANSWERS[Answer.FILE_CANNOT])
def test_a_refusal_for_one_file_applies_to_that_file_only(
    strace: str, directory: Path, source: Path, name: str, file: str
) -> None:
    fork = directory / "fork"

    traced = trace_fork(
        strace, source, fork, calls="ioctl", inject=[f"ioctl:error={name}"], paths=[in_tree(fork, file)]
    )

    assert_alike(source, fork)
    assert methods(traced) == {**dict.fromkeys(FILES, "reflink"), file: "copy"}
    assert traced.result is not None
    assert traced.result["fallback"] is not None
    assert traced.result["fallback"]["errno"] == getattr(errno, name)
    assert traced.result["fallback"]["path"] == file


@pytest.mark.parametrize("name", ERRNOS_OF_ANSWERS[Answer.NOT_YET])
def test_a_temporary_refusal_is_retried(strace: str, directory: Path, source: Path, name: str) -> None:
    fork = directory / "fork"

    traced = trace_fork(
        strace, source, fork, calls="ioctl", inject=[f"ioctl:error={name}:when=1..3"], paths=[in_tree(fork, "c")]
    )

    assert_alike(source, fork)
    assert methods(traced) == dict.fromkeys(FILES, "reflink")
    assert traced.calls(FICLONE) >= 4
    assert traced.result is not None
    assert traced.result["fallback"] is None


@pytest.mark.parametrize("name", ERRNOS_OF_ANSWERS[Answer.NOT_YET])
def test_a_file_that_is_refused_repeatedly_is_copied(strace: str, directory: Path, source: Path, name: str) -> None:
    fork = directory / "fork"

    traced = trace_fork(strace, source, fork, calls="ioctl", inject=[f"ioctl:error={name}"], paths=[in_tree(fork, "b")])

    assert_alike(source, fork)
    assert methods(traced) == {"a": "reflink", "b": "copy", "c": "reflink"}
    assert traced.calls(FICLONE) > 3


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ERRNOS_OF_ANSWERS[Answer.ERROR])
def test_a_ficlone_error_fails_the_fork_without_a_copy(
    strace: str, directory: Path, source: Path, name: str, chunked: bool
) -> None:
    fork = directory / "fork"

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="ioctl",
        inject=[f"ioctl:error={name}"],
        paths=[in_tree(fork, "a")],
        chunked=chunked,
        here=chunked,
    )

    assert traced.calls(FICLONE) == 1
    assert_failed(traced, directory, "no_space" if name in ("ENOSPC", "EDQUOT") else "io_error", name)
    assert traced.result is not None
    assert traced.result["error"] is not None
    assert traced.result["error"]["path"] == str(fork / "a")


def test_a_reflink_that_reports_success_without_effect_is_detected(strace: str, directory: Path, source: Path) -> None:
    """OpenZFS truncated clones and reported success (issue 15728)."""
    fork = directory / "fork"

    traced = trace_fork(strace, source, fork, calls="ioctl", inject=["ioctl:retval=0"], paths=[in_tree(fork, "b")])

    assert traced.result is not None
    error = traced.result["error"]
    assert error is not None
    assert (error["code"], error["path"]) == ("io_error", str(fork / "b"))
    assert "0 bytes" in error["message"]
    assert [path.name for path in directory.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["ENOSYS", "EXDEV", "EINVAL", "EOPNOTSUPP", "ETXTBSY", "EPERM", "EBADF", "ENOENT"])
@pytest.mark.parametrize("when", ["1+", "2+"])
def test_a_refused_copy_file_range_is_continued_with_reads_and_writes(
    strace: str, fresh: Fresh, name: str, when: str
) -> None:
    directory = fresh("ext4")
    source, fork = directory / "source", directory / "fork"
    source.mkdir()
    make_sparse_file(source / "a", 8 * MIB + 5, 2 * MIB)

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="copy_file_range,preadv,preadv2",
        inject=[f"copy_file_range:error={name}:when={when}"],
        paths=[source / "a"],
    )

    assert_alike(source, fork)
    assert methods(traced) == {"a": "copy"}
    assert traced.calls("preadv") > 0
    assert traced.calls("INJECTED") > 0


def test_a_copy_file_range_that_copies_nothing_is_continued_with_reads_and_writes(strace: str, fresh: Fresh) -> None:
    directory = fresh("ext4")
    source, fork = directory / "source", directory / "fork"
    source.mkdir()
    make_sparse_file(source / "a", 8 * MIB + 5, 2 * MIB)

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="copy_file_range,preadv,preadv2",
        inject=["copy_file_range:retval=0"],
        paths=[source / "a"],
    )

    assert_alike(source, fork)
    assert traced.calls("preadv") > 0


def make_three_extents(path: Path) -> None:
    """Extents of 1 MiB, of 64 KiB and of 128 KiB and 5 bytes, with holes between them."""
    with path.open("wb") as file:
        for start, length in ((0, MIB), (2 * MIB, 64 << 10), (4 * MIB, (128 << 10) + 5)):
            file.seek(start)
            file.write(os.urandom(length))


@pytest.mark.parametrize("reflink", ["auto", "never"])
@pytest.mark.parametrize(("kind", "allocated"), [("ext4", 2), ("tmpfs", 0), ("xfs_noreflink", 0), ("btrfs", 0)])
def test_large_extents_are_preallocated_on_ext4(
    strace: str, fresh: Fresh, kind: Kind, allocated: int, reflink: str
) -> None:
    directory = fresh(kind)
    source, fork = directory / "source", directory / "fork"
    source.mkdir()
    make_three_extents(source / "a")

    traced = trace_fork(strace, source, fork, calls="fallocate", reflink=reflink)

    assert_alike(source, fork)
    assert traced.calls("FALLOC_FL_KEEP_SIZE") == allocated
    os.sync()
    assert (fork / "a").stat().st_blocks == (source / "a").stat().st_blocks


@pytest.mark.parametrize("name", ["EOPNOTSUPP", "ENOSYS", "EPERM"])
def test_a_refused_preallocation_is_ignored(strace: str, fresh: Fresh, name: str) -> None:
    """ext3 is served by the same driver and has no fallocate."""
    directory = fresh("ext4")
    source, fork = directory / "source", directory / "fork"
    source.mkdir()
    make_three_extents(source / "a")

    traced = trace_fork(strace, source, fork, calls="fallocate", inject=[f"fallocate:error={name}"])

    assert_alike(source, fork)
    assert methods(traced) == {"a": "copy"}
    assert traced.calls("INJECTED") == 1


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("name", "code"), [("ENOSPC", "no_space"), ("EDQUOT", "no_space"), ("EIO", "io_error")])
def test_an_error_of_the_preallocation_fails_the_fork(
    strace: str, fresh: Fresh, name: str, code: str, chunked: bool
) -> None:
    directory = fresh("ext4")
    source, fork = directory / "source", directory / "fork"
    source.mkdir()
    make_three_extents(source / "a")

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="fallocate",
        inject=[f"fallocate:error={name}"],
        chunked=chunked,
        here=chunked,
    )

    assert_failed(traced, directory, code, name)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("call", "name", "code"),
    [
        ("copy_file_range", "EIO", "io_error"),
        ("copy_file_range", "ENOSPC", "no_space"),
        ("copy_file_range", "EDQUOT", "no_space"),
        ("copy_file_range", "ENOMEM", "io_error"),
        ("lseek", "EINVAL", "sparse_unsupported"),
        ("lseek", "EOPNOTSUPP", "sparse_unsupported"),
        ("lseek", "EIO", "io_error"),
    ],
)
def test_an_error_of_the_sparse_copy_fails_the_fork(
    strace: str, fresh: Fresh, call: str, name: str, code: str, chunked: bool
) -> None:
    directory = fresh("ext4")
    source, fork = directory / "source", directory / "fork"
    source.mkdir()
    make_sparse_file(source / "a", 8 * MIB + 5, 2 * MIB)

    traced = trace_fork(
        strace,
        source,
        fork,
        calls=call,
        inject=[f"{call}:error={name}:when=2+"],
        paths=[source / "a"],
        chunked=chunked,
        here=chunked,
    )

    assert_failed(traced, directory, code, name)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_an_error_of_a_plain_write_fails_the_fork(strace: str, directory: Path, source: Path, name: str) -> None:
    fork = directory / "fork"

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="pwritev,pwritev2",
        inject=[f"pwritev,pwritev2:error={name}:when=2+"],
        paths=[in_tree(fork, "b")],
        reflink="never",
    )

    assert_failed(traced, directory, "no_space" if name == "ENOSPC" else "io_error", name)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("mkdirat", "ENOSPC"),
        ("renameat2", "EINVAL"),  # NFS does not support RENAME_NOREPLACE
        ("renameat2", "EIO"),
        ("syncfs", "EIO"),
        ("fchown", "EIO"),
        ("utimensat", "EIO"),
        ("getdents64", "EIO"),
        ("openat2", "EMFILE"),
    ],
)
def test_an_error_of_any_other_call_fails_the_fork_and_leaves_nothing(
    strace: str, directory: Path, source: Path, call: str, name: str
) -> None:
    fork = directory / "fork"
    (source / "below").mkdir()
    paths = {"getdents64": [source], "openat2": [source], "mkdirat": [in_tree(fork)], "renameat2": [directory]}
    for path in (source / "a", source):
        os.chown(path, 1234, 5678)

    traced = trace_fork(
        strace,
        source,
        fork,
        calls=call,
        inject=[f"{call}:error={name}"],
        paths=paths.get(call, [in_tree(fork), in_tree(fork, "a")]),
        durability="sync",
    )

    assert traced.calls("INJECTED") > 0
    assert_failed(traced, directory, "no_space" if name == "ENOSPC" else "io_error", name)


def test_a_lookup_that_races_with_a_rename_is_retried(strace: str, directory: Path, source: Path) -> None:
    """openat2 returns EAGAIN in that case (openat2(2))."""
    fork = directory / "fork"

    traced = trace_fork(strace, source, fork, calls="openat2", inject=["openat2:error=EAGAIN:when=1..3"])

    assert traced.calls("INJECTED") == 3
    assert_alike(source, fork)


def test_a_durable_fork_is_synced_before_it_is_published_and_its_name_before_it_is_reported(
    strace: str, directory: Path, source: Path
) -> None:
    traced = trace_fork(strace, source, directory / "fork", calls="syncfs,fsync,renameat,renameat2", durability="sync")

    assert traced.durable_steps(directory) == ["tree", "journal", "journal", "publish", "parent"]
    assert_alike(source, directory / "fork")


def test_a_fork_without_durability_syncs_nothing(strace: str, directory: Path, source: Path) -> None:
    traced = trace_fork(strace, source, directory / "fork", calls="syncfs,fsync,fdatasync,sync")

    assert traced.calls("sync") == 0


def test_a_durable_fork_whose_name_cannot_be_synced_is_removed(strace: str, directory: Path, source: Path) -> None:
    traced = trace_fork(
        strace,
        source,
        directory / "fork",
        calls="fsync",
        inject=["fsync:error=EIO"],
        paths=[directory],
        durability="sync",
    )

    assert_failed(traced, directory, "io_error", "EIO")


@pytest.mark.parametrize(
    ("call", "when"),
    [
        *[("mkdirat", n) for n in (1, 2, 3)],
        *[("renameat", n) for n in (1, 2)],
        ("renameat2", 1),
        *[("ioctl", n) for n in (1, 3)],
        ("utimensat", 2),
        *[("unlinkat", n) for n in (1, 2, 3)],
        ("flock", 1),
    ],
)
def test_a_fork_killed_at_any_call_is_complete_or_absent_and_the_next_delivery_ends_it(
    strace: str, directory: Path, source: Path, call: str, when: int
) -> None:
    fork = directory / "fork"
    (source / "below").mkdir()
    paths = [directory, control(fork), in_tree(fork), *(in_tree(fork, file) for file in (*FILES, "below"))]
    paths += [control(fork, name) for name in ("lock", "journal", "journal.new")]

    traced = trace_fork(strace, source, fork, calls=call, inject=[f"{call}:signal=SIGKILL:when={when}"], paths=paths)

    assert traced.result is None, "it was not killed"
    published = fork.exists()
    if published:
        assert_alike(source, fork)
    if leftovers(directory) or not published:
        error = fork_again(source, fork)["error"]
        # The result of a published fork is removed with its journal; the ledger has stored it by then.
        assert error is None or (published and error["code"] == "destination_exists")
    assert_alike(source, fork)
    assert leftovers(directory) == []
