"""The manifest gives back what was written, from any offset and to any process."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.copier import manifest
from tasks.copier.manifest import Span
from tasks.copier.walk import BLOCK_ENTRIES, Block, Entry, Kind

_NUMBERS = len(Entry._fields) - 2

texts = st.binary(max_size=40).map(lambda data: os.fsdecode(data.replace(b"\0", b"-")))
entries = st.builds(
    lambda name, note, numbers: Entry(name, note, *numbers),
    texts,
    texts,
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=_NUMBERS, max_size=_NUMBERS),
)
blocks = st.builds(Block, texts, st.lists(entries, min_size=1, max_size=5))


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
def test_any_blocks_come_back_as_they_were(shared_tmp_path: Path, wanted: list[Block]) -> None:
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


def test_spans_find_every_block_again(tmp_path: Path) -> None:
    spans = write(tmp_path / "manifest", *[Block("d" * n, [entry("f" * n)] * n) for n in range(1, 20)])

    with (tmp_path / "manifest").open("rb") as file:
        assert list(manifest.spans(file.fileno())) == spans


def test_names_that_are_not_utf8_come_back_byte_for_byte(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(range(1, 256)).replace(b"/", b""))

    write(tmp_path / "manifest", Block(name, [entry(name, name)]))

    (block,) = read(tmp_path / "manifest")
    assert os.fsencode(block.path) == os.fsencode(block.entries[0].name) == os.fsencode(name)
    assert block.entries[0].note == name


def test_a_full_block_with_long_notes_comes_back(tmp_path: Path) -> None:
    note = "/".join(["n" * 255] * 20)
    wanted = Block("p" * 4000, [entry(f"{n:0255}", note, Kind.HARDLINK, n) for n in range(BLOCK_ENTRIES)])

    write(tmp_path / "manifest", wanted)

    assert read(tmp_path / "manifest") == [wanted]


def test_an_empty_manifest_has_no_blocks(tmp_path: Path) -> None:
    write(tmp_path / "manifest")

    assert read(tmp_path / "manifest") == []


def test_inode_numbers_of_64_bits_fit(tmp_path: Path) -> None:
    """FUSE, NFS and overlayfs (xino) give numbers with the top bit set."""
    wanted = Block("", [entry("a")._replace(ino=2**64 - 1)])

    write(tmp_path / "manifest", wanted)

    assert read(tmp_path / "manifest") == [wanted]
