"""The entries that `skip` and `exclude` leave out."""

from __future__ import annotations

import time

import pytest

from tasks.copier.options import DEFAULT_EXCLUDE
from tasks.copier.source.selection import Selection
from tasks.copier.staging.control_directory import control_name


def left_out(path: str, *, skip: tuple[str, ...] = (), exclude: tuple[str, ...] = (), directory: bool = False) -> bool:
    parent, _, name = path.rpartition("/")
    return Selection(skip, exclude).reason(parent, name, directory) is not None


@pytest.mark.parametrize(
    ("path", "directory"),
    [
        ("logs", True),
        ("vsock.sock", False),
        ("a/b/agent.sock", False),
        (".sock", False),
        ("memory.lz4.tmp", False),
        ("snapshots/snapshot-latest/memory.zst.tmp", False),
    ],
)
def test_runtime_files_of_a_guest_are_skipped_by_default(path: str, directory: bool) -> None:
    assert left_out(path, exclude=DEFAULT_EXCLUDE, directory=directory)


@pytest.mark.parametrize(
    ("path", "directory"),
    [
        ("logs", False),  # a file of that name
        ("snapshots/logs", True),  # not at the top
        ("logs2", True),
        ("memory.lz4", False),
        ("memory.tmp", False),
        ("sock", False),
        ("a.sock.old", False),
        ("a.sock\n", False),
    ],
)
def test_everything_else_is_cloned_by_default(path: str, directory: bool) -> None:
    assert not left_out(path, exclude=DEFAULT_EXCLUDE, directory=directory)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.raw", "a.raw", True),
        ("*.raw", "a/b/c.raw", True),
        ("*.raw", "a.raw.old", False),
        ("/*.raw", "a.raw", True),
        ("/*.raw", "a/b.raw", False),
        ("a/*.raw", "a/b.raw", True),
        ("a/*.raw", "a/b/c.raw", False),
        ("a/*.raw", "x/a/b.raw", False),
        ("a?c", "abc", True),
        ("/a?c", "a/c", False),
        ("a[bc]d", "abd", True),
        ("a[!bc]d", "abd", False),
        ("a[!bc]d", "axd", True),
        ("/a[!x]c", "a/c", False),
        ("[", "[", True),
        ("a[b", "a[b", True),
        ("a.b", "axb", False),
        ("a+(b)$^", "a+(b)$^", True),
        ("**", "anything", True),
        ("*", "line\nbreak", True),
        ("a*b*c", "a1b2b3c", True),
        ("a*b*c", "a1c2b", False),
        ("*\udcff", "name-\udcff", True),
        ("", "anything", False),
    ],
)
def test_patterns_match_as_in_a_shell(pattern: str, path: str, matches: bool) -> None:
    assert left_out(path, exclude=(pattern,)) is matches


def test_a_trailing_slash_limits_a_pattern_to_directories() -> None:
    assert left_out("a/cache", exclude=("cache/",), directory=True)
    assert not left_out("a/cache", exclude=("cache/",), directory=False)


def test_skip_takes_exact_relative_paths_and_no_patterns() -> None:
    assert left_out("a/b", skip=("a/b",))
    assert left_out("a/b", skip=("a/b/",), directory=True)
    assert not left_out("x/a/b", skip=("a/b",))
    assert not left_out("b", skip=("a/b",))
    assert not left_out("abc", skip=("a*",))


def test_reasons_name_the_option_that_skipped_an_entry() -> None:
    selection = Selection(("state",), ("*.raw", "/logs/"))

    assert selection.reason("", "state", False) == "skip"
    assert selection.reason("a", "b.raw", False) == "excluded by *.raw"
    assert selection.reason("", "logs", True) == "excluded by /logs/"


def test_staging_of_another_fork_is_never_cloned() -> None:
    selection = Selection((), ())

    assert selection.reason("a", control_name("fork-1"), True) is not None
    assert selection.reason("a", control_name("fork-1") + ".0123abcd", True) is not None
    assert selection.reason("a", ".forkvm-settings", True) is None


@pytest.mark.parametrize("suffix", ["", ".0123abcd"])
def test_a_file_with_a_name_of_staging_is_never_cloned(suffix: str) -> None:
    selection = Selection((), ())

    assert selection.reason("", control_name("fork-1") + suffix, False) == "a name of staging"
    assert selection.reason("a", control_name("fork-1") + suffix, False) == "a name of staging"
    assert selection.reason("a", control_name("fork-1") + suffix + "\n", False) is None
    assert selection.reason("a", control_name("fork-1") + ".raw", False) is None
    assert selection.reason("a", ".forkvm-settings", False) is None


def test_a_hostile_pattern_is_matched_in_milliseconds() -> None:
    selection = Selection((), ("*a" * 100 + "b",))
    began = time.process_time()

    assert selection.reason("", "a" * 255, False) is None

    assert time.process_time() - began < 0.5
