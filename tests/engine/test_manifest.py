"""The manifest returns what was written, from any offset and to any process."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.copier.errors import ForkError
from tasks.copier.source import manifest
from tasks.copier.source.manifest import Span
from tasks.copier.source.walk import BLOCK_ENTRIES, Block, Entry, Kind

_NUMBERS = len(Entry._fields) - 2

_U32, _S63, _U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**64 - 1)
_TIME = st.integers(-(2**63), 2**63 - 1)

texts = st.binary(max_size=40).map(lambda data: os.fsdecode(data.replace(b"\0", b"-")))
names = texts.map(lambda text: text.replace("/", "-")).filter(lambda name: name not in ("", ".", ".."))
paths = st.lists(names, max_size=4).map("/".join)
entries = st.builds(
    lambda name, note, numbers: Entry(name, note, int(Kind.SKIP), *numbers),
    names,
    texts,
    st.tuples(_U32, _U32, _U32, _U64, _U64, _U64, _S63, _S63, _TIME, _TIME, _TIME),
)
links = st.builds(
    lambda entry, path, name: entry._replace(kind=Kind.HARDLINK, note=f"{path}/{name}".lstrip("/")),
    entries,
    paths,
    names,
)
blocks = st.builds(Block, paths, st.lists(st.one_of(entries, links), min_size=1, max_size=5))


def entry(name: str, note: str = "", kind: int = Kind.FILE, number: int = 0) -> Entry:
    return Entry(name, note, kind, *[number] * (_NUMBERS - 1))


def write(path: Path, *wanted: Block) -> list[Span]:
    with path.open("wb") as file:
        writer = manifest.Writer(file)
        spans = [writer.append(block) for block in wanted]
        writer.flush()
    return spans


def read(path: Path, span: Span | None = None) -> list[Block]:
    with path.open("rb") as file:
        return list(manifest.read(file.fileno(), span or manifest.whole(file.fileno())))


@settings(max_examples=50)
@given(wanted=st.lists(blocks, max_size=5))
def test_any_blocks_are_read_back_unchanged(shared_tmp_path: Path, wanted: list[Block]) -> None:
    path = shared_tmp_path / "manifest"

    spans = write(path, *wanted)

    assert read(path) == wanted
    for block, span in zip(wanted, spans, strict=True):
        assert read(path, span) == [block]


def test_a_run_of_blocks_is_read_from_the_middle(tmp_path: Path) -> None:
    wanted = [Block(f"directory-{n}", [entry(f"file-{n}", number=n)]) for n in range(10)]
    spans = write(tmp_path / "manifest", *wanted)

    middle = Span(spans[3].offset, spans[3].length + spans[4].length + spans[5].length)

    assert read(tmp_path / "manifest", middle) == wanted[3:6]


def test_every_block_is_found_by_its_span(tmp_path: Path) -> None:
    spans = write(tmp_path / "manifest", *[Block("d" * n, [entry("f" * n)] * n) for n in range(1, 20)])

    with (tmp_path / "manifest").open("rb") as file:
        assert list(manifest.spans(file.fileno())) == spans


def test_names_that_are_not_utf8_are_read_back_byte_for_byte(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(range(1, 256)).replace(b"/", b""))

    write(tmp_path / "manifest", Block(name, [entry(name, name)]))

    (block,) = read(tmp_path / "manifest")
    assert os.fsencode(block.path) == os.fsencode(block.entries[0].name) == os.fsencode(name)
    assert block.entries[0].note == name


def test_a_full_block_with_long_notes_is_read_back(tmp_path: Path) -> None:
    note = "/".join(["n" * 255] * 20)
    wanted = Block("p" * 4000, [entry(f"{n:0255}", note, Kind.HARDLINK, n) for n in range(BLOCK_ENTRIES)])

    write(tmp_path / "manifest", wanted)

    assert read(tmp_path / "manifest") == [wanted]


GOOD = entry("file")
#: Entries that no walk of a source writes, and that would lead out of the source or break the reader.
HOSTILE: dict[str, Block] = {
    "a name with a slash": Block("", [GOOD, entry("../../outside/shadow")]),
    "the parent as a name": Block("", [entry("..")]),
    "the directory itself as a name": Block("", [entry(".")]),
    "no name": Block("", [entry("")]),
    "a path that leads up": Block("a/../../outside", [GOOD]),
    "an absolute path": Block("/etc", [GOOD]),
    "a path with an empty part": Block("a//b", [GOOD]),
    "a link out of the source": Block("", [entry("link", "../outside", Kind.HARDLINK)]),
    "a link to an absolute path": Block("", [GOOD, entry("link", "/etc/shadow", Kind.HARDLINK)]),
    "a link to nothing": Block("", [entry("link", "", Kind.HARDLINK)]),
    "an unknown kind": Block("", [entry("file", "", 9)]),
    "a negative kind": Block("", [entry("file", "", -1)]),
    "a mode of more than 32 bits": Block("", [GOOD._replace(mode=1 << 32)]),
    "an owner of more than 32 bits": Block("", [GOOD._replace(uid=1 << 40)]),
    "a group of more than 32 bits": Block("", [GOOD._replace(gid=1 << 62)]),
    "a negative owner": Block("", [GOOD._replace(uid=-1)]),
    "a negative size": Block("", [GOOD, GOOD._replace(size=-1)]),
    "a size of 64 bits": Block("", [GOOD._replace(size=1 << 63)]),
    "a negative size beside a number of 64 bits": Block("", [GOOD._replace(ino=2**64 - 1, size=-5)]),
    "a number of 1,000 bits": Block("", [GOOD._replace(ino=1 << 1000)]),
    "a time that no call accepts": Block("", [GOOD._replace(atime=1 << 120)]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_entries_that_no_walk_writes_are_refused(tmp_path: Path, what: str) -> None:
    write(tmp_path / "manifest", HOSTILE[what])

    with pytest.raises(ForkError, match="damaged"):
        read(tmp_path / "manifest")


@pytest.mark.parametrize("header", [(0, 0, 0, 0, 0), (0, 1, 0, 1, 2**32 - 1), (2**32 - 1, 2**32 - 1, 0, 0, 1)])
def test_a_block_with_an_invalid_size_is_refused_before_it_is_read(tmp_path: Path, header: tuple[int, ...]) -> None:
    with (tmp_path / "manifest").open("wb") as file:
        file.write(struct.pack("=IIIII", *header))
        file.truncate(1 << 40)

    with pytest.raises(ForkError, match="damaged"), (tmp_path / "manifest").open("rb") as file:
        next(manifest.spans(file.fileno()))
    with pytest.raises(ForkError, match="damaged"):
        read(tmp_path / "manifest")


@pytest.mark.parametrize("kept", [1, 20, 30, 100])
def test_a_manifest_that_ends_within_a_block_is_refused(tmp_path: Path, kept: int) -> None:
    write(tmp_path / "manifest", Block("directory", [entry("file")]))
    os.truncate(tmp_path / "manifest", kept)

    with pytest.raises(ForkError, match="damaged"):
        read(tmp_path / "manifest", Span(0, 1000))


def test_an_empty_manifest_has_no_blocks(tmp_path: Path) -> None:
    write(tmp_path / "manifest")

    assert read(tmp_path / "manifest") == []


def test_inode_numbers_of_64_bits_are_supported(tmp_path: Path) -> None:
    """FUSE, NFS and overlayfs (xino) use inode numbers with the top bit set."""
    wanted = Block("", [entry("a")._replace(ino=2**64 - 1)])

    write(tmp_path / "manifest", wanted)

    assert read(tmp_path / "manifest") == [wanted]
