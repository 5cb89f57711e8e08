"""One file cloned alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.single import clone_file
from tasks.copier.options import Options
from tasks.copier.progress import Progress
from tasks.copier.roots import Roots
from tests.fixtures.filesystems import Fresh
from tests.support.extents import allocated_bytes, sharing
from tests.support.guests import make_sparse_file


def go_on(progress: Progress) -> None:
    """Never ends it."""


def clone(source: Path, destination: Path, options: Options | None = None, roots: Roots | None = None) -> str:
    return clone_file(str(source), str(destination), options or Options(), roots or Roots(), go_on)["method"]


def test_a_file_is_reflinked_with_its_metadata(reflink_fs: Path) -> None:
    source, destination = reflink_fs / "disk.raw", reflink_fs / "clone.raw"
    make_sparse_file(source, 16 << 20, 4 << 20)
    source.chmod(0o640)
    os.utime(source, ns=(1_000_000_001, 2_000_000_002))

    method = clone(source, destination)

    assert method == "reflink"
    assert destination.read_bytes() == source.read_bytes()
    assert sharing(destination).whole
    status = destination.stat()
    assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o640, 2_000_000_002)
    assert sorted(path.name for path in reflink_fs.iterdir()) == ["clone.raw", "disk.raw"]


def test_a_file_is_copied_sparsely_where_it_cannot_be_reflinked(fresh: Fresh) -> None:
    source, destination = fresh("xfs") / "disk.raw", fresh("tmpfs") / "disk.raw"
    make_sparse_file(source, 64 << 20, 4 << 20)

    method = clone(source, destination, Options(durability="sync", verify="content"))

    assert method == "copy"
    assert destination.read_bytes() == source.read_bytes()
    assert allocated_bytes(destination) <= 12 << 20


def test_what_stands_at_the_destination_stays_as_it_is(fresh: Fresh) -> None:
    place = fresh("xfs")
    (place / "a").write_text("new")
    (place / "b").write_text("old")
    (place / "dangling").symlink_to("nowhere")

    for destination in (place / "b", place / "dangling"):
        with pytest.raises(ForkError) as refused:
            clone(place / "a", destination)
        assert refused.value.code is Code.DESTINATION_EXISTS

    assert (place / "b").read_text() == "old"
    assert sorted(path.name for path in place.iterdir()) == ["a", "b", "dangling"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("missing", Code.SOURCE_NOT_FOUND),
        ("directory", Code.UNSUPPORTED_FILE_TYPE),
        ("link", Code.UNSUPPORTED_FILE_TYPE),
    ],
)
def test_only_a_regular_file_can_be_cloned_alone(fresh: Fresh, name: str, code: Code) -> None:
    place = fresh("xfs")
    (place / "directory").mkdir()
    (place / "link").symlink_to("directory")

    with pytest.raises(ForkError) as refused:
        clone(place / name, place / "clone")

    assert refused.value.code is code
    assert refused.value.path == str(place / name)
    assert not (place / "clone").exists()


def test_a_file_outside_the_roots_is_neither_read_nor_written(fresh: Fresh) -> None:
    place, outside = fresh("xfs"), fresh("ext4")
    (place / "a").write_text("a")
    (outside / "b").write_text("b")
    roots = Roots((str(place),))

    for source, destination in ((outside / "b", place / "c"), (place / "a", outside / "c")):
        with pytest.raises(ForkError) as refused:
            clone(source, destination, roots=roots)
        assert refused.value.code is Code.OUTSIDE_ROOTS
