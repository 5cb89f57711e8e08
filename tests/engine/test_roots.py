"""Paths in requests, and the limits within which they are opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel import trees
from tasks.copier.roots import Roots, is_inside, normal_path


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/a/b", "/a/b"),
        ("//a///b/", "/a/b"),
        ("/./a/./b/.", "/a/b"),
        ("/", "/"),
        ("/a..b/..c", "/a..b/..c"),
        ("/name-\udcff", "/name-\udcff"),
        ("/" + "a" * 4094, "/" + "a" * 4094),
    ],
)
def test_normal_path_is_the_shortest_equivalent_path(path: str, normal: str) -> None:
    assert normal_path(path, "source") == normal


@pytest.mark.parametrize(
    "path",
    ["", "a/b", "./a", "~/a", "/a/../b", "/..", "/a/..", "/a\0b", "/\ud800", "/" + "a" * 4095, "/" + "é" * 2048],
)
def test_ambiguous_paths_are_refused(path: str) -> None:
    with pytest.raises(ForkError) as refusal:
        normal_path(path, "source")

    assert refusal.value.code is Code.INVALID_REQUEST
    assert refusal.value.path == path
    assert refusal.value.message.startswith("source: ")


KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    "path",
    [
        f"/a/.forkvm-{KEY}",
        f"/a/.forkvm-{KEY}.01234567",
        f"/a/.forkvm-{KEY}/b",
        f"/.forkvm-{KEY}.01234567/b/c",
        f"/a//.forkvm-{KEY}/",
        f"/a/.FORKVM-{KEY.upper()}",
    ],
)
@pytest.mark.parametrize("field", ["source", "destination"])
def test_paths_through_a_staging_name_are_refused(path: str, field: str) -> None:
    with pytest.raises(ForkError, match="looks like a staging name") as refusal:
        normal_path(path, field)

    assert refusal.value.code is Code.INVALID_REQUEST
    assert refusal.value.message.startswith(f"{field}: .")


@pytest.mark.parametrize(
    "name", [f".forkvm-{KEY}0", f".forkvm-{KEY[1:]}", f".forkvm-{KEY}.1", f"forkvm-{KEY}", f".forkvm-{KEY}.g1234567"]
)
def test_names_that_only_resemble_staging_names_are_accepted(name: str) -> None:
    assert normal_path(f"/{name}", "destination") == f"/{name}"


def test_symlink_into_staging_is_refused_for_both_ends(workdir: Path) -> None:
    (workdir / f"a/.forkvm-{KEY}/inner").mkdir(parents=True)
    (workdir / "a/link").symlink_to(f".forkvm-{KEY}")
    (workdir / "a/inner").symlink_to("link/inner")

    for roots in (roots_of(workdir), Roots()):
        for path in (workdir / "a/link", workdir / "a/link/inner", workdir / "a/inner"):
            assert code_of(partial(roots.open_source, str(path))) is Code.INVALID_REQUEST
            assert code_of(partial(roots.open_parent, str(path / "vm"))) is Code.INVALID_REQUEST


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Two roots, `a` and `b`, and `outside`; links out of `a` and within it."""
    for name in ("a/guest/sub", "b/guest", "outside/guest", "ab/guest"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "a/within").symlink_to("guest")
    (tmp_path / "a/absolute").symlink_to(tmp_path / "a/guest")
    (tmp_path / "a/out").symlink_to("../outside")
    (tmp_path / "a/to-b").symlink_to(tmp_path / "b")
    (tmp_path / "a/loop").symlink_to("loop")
    (tmp_path / "a/guest/magic").symlink_to("/proc/self/cwd")
    return tmp_path


def opened(open_it: Callable[[], int]) -> Path:
    """The path of the descriptor that `open_it` returns."""
    fd = open_it()
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def code_of(open_it: Callable[[], object]) -> Code:
    with pytest.raises(ForkError) as refusal:
        open_it()
    return refusal.value.code


def roots_of(workdir: Path) -> Roots:
    return Roots((str(workdir / "a"), str(workdir / "b")))


def test_paths_within_a_root_are_opened(workdir: Path) -> None:
    roots = roots_of(workdir)

    assert opened(lambda: roots.open_source(str(workdir / "a/guest"))) == workdir / "a/guest"
    assert opened(lambda: roots.open_source(str(workdir / "b/guest/"))) == workdir / "b/guest"
    assert opened(lambda: roots.open_source(str(workdir / "a"))) == workdir / "a"


def test_a_symlink_that_stays_within_its_root_is_followed(workdir: Path) -> None:
    assert opened(lambda: roots_of(workdir).open_source(str(workdir / "a/within/sub"))) == workdir / "a/guest/sub"


@pytest.mark.parametrize(
    "path",
    [
        "outside/guest",
        "ab/guest",  # begins with the name of a root
        "",
        "a/out/guest",
        "a/absolute",
        "a/to-b/guest",  # into the other root: a path must stay within its own root
        "a/guest/magic",
        "a/loop",
    ],
)
def test_no_path_and_no_symlink_leads_out_of_a_root(workdir: Path, path: str) -> None:
    roots, outside_path = roots_of(workdir), str(workdir / path)

    assert code_of(lambda: roots.open_source(outside_path)) is Code.OUTSIDE_ROOTS
    assert code_of(lambda: roots.open_parent(f"{outside_path}/fork")) is Code.OUTSIDE_ROOTS


def test_without_roots_only_the_callers_own_rights_apply(workdir: Path) -> None:
    assert opened(lambda: Roots().open_source(str(workdir / "a/out/guest"))) == workdir / "outside/guest"
    assert code_of(lambda: Roots().open_source(str(workdir / "a/loop"))) is Code.INVALID_REQUEST
    assert code_of(lambda: Roots().open_parent(str(workdir / "a/loop/fork"))) is Code.INVALID_REQUEST


def test_a_missing_source_and_a_source_that_is_no_directory_have_different_codes(workdir: Path) -> None:
    for roots in (Roots(), roots_of(workdir)):
        assert code_of(lambda r=roots: r.open_source(str(workdir / "a/none"))) is Code.SOURCE_NOT_FOUND  # type: ignore[misc]
        assert code_of(lambda r=roots: r.open_source(str(workdir / "a/file"))) is Code.SOURCE_NOT_DIRECTORY  # type: ignore[misc]
        assert code_of(lambda r=roots: r.open_source(str(workdir / "a/file/x"))) is Code.SOURCE_NOT_DIRECTORY  # type: ignore[misc]


def test_a_destination_is_its_parent_and_a_name(workdir: Path) -> None:
    fd, name = roots_of(workdir).open_parent(str(workdir / "a/within/fork/"))

    assert (opened(lambda: fd), name) == (workdir / "a/guest", "fork")


def test_a_destination_whose_parent_cannot_hold_it_is_an_invalid_request(workdir: Path) -> None:
    roots = roots_of(workdir)

    assert code_of(lambda: roots.open_parent(str(workdir / "a/none/fork"))) is Code.INVALID_REQUEST
    assert code_of(lambda: roots.open_parent(str(workdir / "a/file/fork"))) is Code.INVALID_REQUEST
    assert code_of(lambda: roots.open_parent(str(workdir / "a" / ("n" * 256)))) is Code.INVALID_REQUEST
    assert code_of(lambda: roots.open_parent(str(workdir / "a" / ("n" * 256) / "fork"))) is Code.INVALID_REQUEST


def test_a_root_itself_is_a_destination_that_exists(workdir: Path) -> None:
    assert code_of(lambda: roots_of(workdir).open_parent(str(workdir / "a"))) is Code.DESTINATION_EXISTS
    assert code_of(lambda: Roots().open_parent("/")) is Code.DESTINATION_EXISTS


def test_no_refusal_leaks_a_descriptor(workdir: Path) -> None:
    roots, before = roots_of(workdir), len(os.listdir("/proc/self/fd"))

    for path in ("a/out/guest", "a/none", "a/file"):
        code_of(lambda p=path: roots.open_source(str(workdir / p)))  # type: ignore[misc]
        code_of(lambda p=path: roots.open_parent(str(workdir / p / "fork")))  # type: ignore[misc]

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_is_inside_itself_and_its_ancestors_by_any_path(workdir: Path) -> None:
    fd = os.open(workdir / "a/within/sub", os.O_RDONLY)
    try:
        assert is_inside(fd, os.stat(workdir / "a/guest/sub"))
        assert is_inside(fd, os.stat(workdir / "a"))
        assert is_inside(fd, os.stat("/"))
        assert not is_inside(fd, os.stat(workdir / "b"))
    finally:
        os.close(fd)


def test_a_directory_is_inside_its_ancestors_however_deep_it_is(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1_100):  # more than a path of PATH_MAX bytes leads up
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below

        assert is_inside(fd, os.stat(tmp_path))
        assert not is_inside(fd, os.stat(tmp_path / "other"))
    finally:
        os.close(fd)
        top = os.open(tmp_path, os.O_RDONLY)
        trees.remove(top, "d")
        os.close(top)
