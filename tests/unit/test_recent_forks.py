"""Notes about ended forks: read as untrusted data, kept for minutes, accepted only if they match the destination."""

from __future__ import annotations

import base64
import logging
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.copier.errors import ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, succeeded
from tasks.copier.report import Totals
from tasks.copier.roots import Roots
from tasks.store.recent_forks.files import KEPT_SECONDS, Note, NoteFiles
from tasks.store.recent_forks.forks import RecentForks
from tasks.store.recent_forks.record import NotedFork, Record

RECORD = Record("digest", 7, {3: NotedFork(11, 12, '{"a":1}', {"all": [b"x", b"yz\n"]})})


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def store(tmp_path: Path) -> NoteFiles:
    (tmp_path / "notes").mkdir()
    return NoteFiles(str(tmp_path / "notes"))


def _directory(tmp_path: Path) -> Path:
    return tmp_path / "notes" / f"forkvm-ended-{os.geteuid()}"


def _fork(tmp_path: Path) -> tuple[ForkSpec, ForkResult]:
    (tmp_path / "b").mkdir()
    spec = ForkSpec(fork_id="f", source=str(tmp_path / "a"), destination=str(tmp_path / "b"))
    return spec, succeeded(spec, Totals(), 1, Clock(spec.started))


@pytest.mark.parametrize("size", [1, 10_000])
def test_a_record_is_read_back_unchanged(size: int) -> None:
    record = replace(RECORD, forks={n: replace(RECORD.forks[3], pages={"plan": [b"x" * size]}) for n in range(3)})

    assert Record.from_text(record.to_text()) == record


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"p",
        b"p!!!",
        b"z" + base64.b64encode(b"no zlib"),
        b"z" + base64.b64encode(zlib.compress(bytes(65 << 20), 1)),
        b"q" + RECORD.to_text()[1:],
        RECORD.to_text()[:-8],
        *(
            b"p" + base64.b64encode(text)
            for text in (
                b"[]\n",
                b"null\n",
                b'{"digest":1,"device":7,"forks":{}}\n',
                b'{"digest":"d","device":-1,"forks":{}}\n',
                b'{"digest":"d","device":7,"forks":{"x":[1,2,{}]}}\n{}\n',
                b'{"digest":"d","device":7,"forks":{"1":[1,2]}}\n{}\n',
                b'{"digest":"d","device":7,"forks":{"1":[1,2,{}]}}\n',
                b'{"digest":"d","device":7,"forks":{"1":[1,2,{"all":[9]}]}}\n{}\nx',
                b'{"digest":"d","device":7,"forks":{"1":[1,2,{"../x":[1]}]}}\n{}\nx',
                b'{"digest":"d","device":7,"forks":{"1":[1,2,{}]}}\n{}\nmore',
                b'{"digest":"d","device":7,"forks":{"1":[1,2,{}]}}\n\xff\n',
            )
        ),
    ],
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ForkError):
        Record.from_text(text)


def test_a_noted_fork_is_found_while_it_exists(tmp_path: Path, store: NoteFiles, parent: int) -> None:
    spec, result = _fork(tmp_path)
    forks, roots = RecentForks(store), Roots((str(tmp_path),))
    forks.note_fork(spec, parent, "b", result, {"all": [b"page"]})

    found = RecentForks(NoteFiles(store.parent)).find(roots, replace(spec, started=1.0, queued=2.0))

    assert found is not None
    assert (found.result, found.pages) == (result, {"all": [b"page"]})
    assert forks.find(roots, replace(spec, labels=["other"])) is None
    assert forks.find(roots, replace(spec, fork_id="g")) is None
    (tmp_path / "b").rmdir()
    assert forks.find(roots, spec) is None
    (tmp_path / "b").mkdir()  # possibly with the same inode
    assert forks.find(roots, spec) is None


def test_a_garbled_note_is_ignored(tmp_path: Path, store: NoteFiles, parent: int) -> None:
    spec, result = _fork(tmp_path)
    forks, roots = RecentForks(store), Roots((str(tmp_path),))
    forks.note_fork(spec, parent, "b", {**result, "destination": str(tmp_path / "elsewhere")}, {})
    assert forks.find(roots, spec) is None
    forks.note_fork(spec, parent, "b", {**result, "files": {"total": -1}}, {})
    assert forks.find(roots, spec) is None
    forks.note_fork(spec, parent, "b", result, {})
    assert forks.find(roots, spec) is not None

    (file,) = _directory(tmp_path).iterdir()
    file.write_bytes(file.read_bytes()[:-20] + b"\n\0\xff\n")

    assert forks.find(roots, spec) is None


def test_old_notes_are_purged(tmp_path: Path, store: NoteFiles) -> None:
    store.add("new", Note(0, 0, b"x"))
    directory = _directory(tmp_path)
    (old := directory / f"ended-{int(time.time() - KEPT_SECONDS - 120) // 60}-00").touch(0o600)
    (ahead := directory / f"ended-{int(time.time() + 3600) // 60}-00").touch(0o600)
    (foreign := directory / "foreign").touch(0o600)

    NoteFiles(store.parent).add("other", Note(0, 0, b"y"))  # the first note of a process purges old ones

    assert not any(path.exists() for path in (old, ahead, foreign))
    assert [note.data for note in store.find("new")] == [b"x"]


def test_a_directory_that_is_not_ours_is_not_used(
    tmp_path: Path, store: NoteFiles, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "target").mkdir(0o700)
    _directory(tmp_path).symlink_to(tmp_path / "target")

    with caplog.at_level(logging.WARNING):
        store.add("f", Note(0, 0, b"x"))
        assert list(store.find("f")) == []

    assert list((tmp_path / "target").iterdir()) == []
    assert len(caplog.records) == 1


def test_a_symlink_is_not_used(tmp_path: Path, store: NoteFiles) -> None:
    store.add("f", Note(0, 0, b"x"))
    (file,) = _directory(tmp_path).iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")

    before = (tmp_path / "elsewhere").read_bytes()
    store.add("f", Note(0, 0, b"y"))

    assert list(store.find("f")) == []
    assert (tmp_path / "elsewhere").read_bytes() == before
