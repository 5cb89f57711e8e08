"""How much a small fork asks of the kernel. A process that has made one fork makes the next with few calls."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import fork
from tests.support.engine.traced_processes import TracedChild, calls_of
from tests.support.requirements import require_command

#: Calls of a fork of six files: 168 were counted, among them one for each directory above the destination.
_MOST_CALLS = 175
#: Calls for each file: two openat, FICLONE, utimensat, flistxattr, four newfstatat, two close.
_MOST_CALLS_A_FILE = 11
#: Calls that depend on the time, not on the files: the type of a filesystem is asked for again after 50 ms.
_TIMED_CALLS = 4


def _calls(strace: str, directory: Path, files: int, forks: int) -> int:
    """The system calls of forks of as many files, one after the other in one process."""
    source = directory / f"source-{files}"
    source.mkdir(exist_ok=True)
    for number in range(files):
        (source / f"f{number}").write_bytes(bytes(5000))

    def make() -> None:
        for number in range(forks):
            result = fork(source, directory / f"fork-{files}-{forks}-{number}", fork_id=f"fork-{number}")
            assert result["error"] is None

    traced = TracedChild(strace, directory / f"log-{files}-{forks}", make)
    traced.begin()
    traced.result()
    return len(calls_of(traced.trace()))


def test_a_warm_fork_of_six_small_files_takes_few_system_calls(fresh: Fresh) -> None:
    strace, directory = require_command("strace", "the counting of system calls"), fresh("xfs")

    of_six = _calls(strace, directory, 6, 2) - _calls(strace, directory, 6, 1)
    of_sixteen = _calls(strace, directory, 16, 2) - _calls(strace, directory, 16, 1)

    assert of_six <= _MOST_CALLS
    assert of_sixteen - of_six <= 10 * _MOST_CALLS_A_FILE + _TIMED_CALLS
