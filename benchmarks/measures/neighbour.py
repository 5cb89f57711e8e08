"""The effect of a copy on a neighbour on the same disk and in the same memory, beside `cp` and `rsync --bwlimit`.

The neighbour and the copy run in one control group with less memory than both need, so that pages of the copy can evict
those of the neighbour. The ways to copy are measured in turn, several times, and the calls of the neighbour in all
rounds are counted together: in one round it makes some two hundred fsyncs, and their p99 would be the second slowest.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.cases import BIG
from benchmarks.contenders.programs import ContenderFailed, last_lines
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, sync
from tasks.copier.kernel.page_cache import absent_pages

#: The neighbour's file, the memory that it shares with the copy, and what the disk's pace is measured with, in bytes.
_FILE_BYTES, _MEMORY_BYTES, _PACE_BYTES = 1 << 30, 3 << 30, 1 << 30
CASES = (replace(BIG, room=BIG.room + _FILE_BYTES + _PACE_BYTES),)

#: The memory controller of control groups of version 1; in version 2 each group has all controllers.
_MEMORY_CONTROLLER = Path("/sys/fs/cgroup/memory")
_NAME = "forkvm-bench-neighbour"
#: How often each way to copy is measured.
_ROUNDS = 5
#: How long the neighbour is measured alone in a round, in seconds.
_ALONE_SECONDS = 10.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: The targets: the fsync p99 with defaults by that beside cp, and with a rate by that alone; the share of pages evicted
#: with `cache: drop`.
_MOST_BY_CP, _MOST_BY_ALONE, _MOST_EVICTED = 0.5, 1.5, 5.0


@dataclass
class _Measured:
    """What was measured of one way to copy, in all rounds."""

    #: Seconds of the copy, and the share of the neighbour's pages that were evicted, in percent.
    copy: list[float] = field(default_factory=list)
    evicted: list[float] = field(default_factory=list)
    #: Milliseconds of each call of the neighbour while the copy was made.
    read: list[float] = field(default_factory=list)
    fsync: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, tuple[float, str]]:
        """Values and units: medians of the rounds, and percentiles of all calls."""
        return {
            "copy": (statistics.median(self.copy), "s"),
            **{f"read p{share}": (_percentile(self.read, share), "ms") for share in (50, 99)},
            **{f"fsync p{share}": (_percentile(self.fsync, share), "ms") for share in (50, 99)},
            "evicted": (statistics.median(self.evicted), "%"),
        }


def measure_neighbour(filesystem: Filesystem) -> Iterator[Finding]:
    """The neighbour's p50 and p99, the copy's time and the evicted pages, for each way to copy."""
    _use_direct_io(filesystem.path)
    pace = _pace(filesystem.path)
    yield Finding(f"{filesystem.name}: the disk writes", pace / 1e6, "MB/s")
    found: dict[str, _Measured] = {}
    with built(CASES[0], filesystem) as source, _group() as group:
        file = filesystem.path / "neighbour"
        _fill(file)
        ways = list(_ways(source, filesystem.path / "copy", pace / 4))
        for number in range(_ROUNDS):
            for name, command, env in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
                log(f"neighbour: {name}, round {number + 1} of {_ROUNDS}")
                _measure(filesystem, group, file, command, env, found.setdefault(name, _Measured()))
    for name, _, _ in ways:
        for what, (value, unit) in found[name].figures().items():
            most = _MOST_EVICTED if (name, what) == ("forkvm, cache=drop", "evicted") else None
            yield Finding(f"{filesystem.name}, {name}: {what}", value, unit, most)
    p99 = {name: _percentile(measured.fsync, 99) for name, measured in found.items()}
    yield Finding(f"{filesystem.name}: fsync p99, forkvm by cp", p99["forkvm"] / p99["cp"], "", _MOST_BY_CP)
    by_alone = p99["forkvm, a quarter"] / p99["alone"]
    yield Finding(f"{filesystem.name}: fsync p99, forkvm at a quarter by alone", by_alone, "", _MOST_BY_ALONE)


def _percentile(values: list[float], share: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * share // 100)]


def _ways(source: Path, copy: Path, rate: float) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Name, command and variables of each way to copy; `rate` is a quarter of the disk's pace."""
    forkvm = [sys.executable, "-m", "worker.cli", "fork", str(source), str(copy), "--reflink", "never"]
    yield "alone", ["sleep", str(_ALONE_SECONDS)], {}
    yield "cp", ["cp", "-a", "--reflink=never", str(source), str(copy)], {}
    if shutil.which("rsync") is not None:
        yield "rsync, a quarter", ["rsync", "-aS", f"--bwlimit={int(rate) >> 10}", f"{source}/", f"{copy}/"], {}
    else:
        log("rsync is not installed: not measured")
    yield "forkvm", forkvm, {}
    yield "forkvm, cache=drop", [*forkvm, "--cache", "drop"], {}
    yield "forkvm, a quarter", forkvm, {"FORKVM_COPY_RATE": str(int(rate))}


def _measure(
    filesystem: Filesystem, group: Path, file: Path, command: list[str], env: Mapping[str, str], found: _Measured
) -> None:
    """Add to `found` one copy beside the neighbour. Raises ContenderFailed."""
    sync(filesystem)
    _drop_caches()
    runtime = filesystem.path / "runtime"
    variables = {**os.environ, "FORKVM_RUNTIME_DIR": str(runtime), **env}
    neighbour = _in_group(group, [sys.executable, "-m", "benchmarks.contenders.neighbour", str(file), f"{file}.log"])
    with subprocess.Popen(neighbour, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        subprocess.run(_in_group(group, ["cat", str(file)]), stdout=subprocess.DEVNULL, check=True)
        before = _cached(file)
        process.stdin.write("begin\n")
        process.stdin.flush()
        began = time.perf_counter()
        done = subprocess.run(_in_group(group, command), env=variables, capture_output=True, text=True)
        process.stdin.close()
        found.copy.append(time.perf_counter() - began)
        found.evicted.append(100 * max(0, before - _cached(file)) / max(1, before))
        took = json.loads(process.stdout.read())
    for left in (filesystem.path / "copy", runtime):
        remove(left)
    if done.returncode:
        raise ContenderFailed(f"{command[0]}: {last_lines(done.stderr)}")
    found.read += took["read"]
    found.fsync += took["fsync"]


@contextmanager
def _group() -> Iterator[Path]:
    """A control group with little memory. Where none can be created, the measure runs with all memory."""
    first = _MEMORY_CONTROLLER.is_dir()
    group = (_MEMORY_CONTROLLER if first else _MEMORY_CONTROLLER.parent) / _NAME
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(_MEMORY_BYTES))
    except OSError as error:
        log(f"no control group with a limit of memory ({error}): the figures of evicted pages mean little")
    try:
        yield group
    finally:
        if group.exists():
            group.rmdir()


def _in_group(group: Path, command: list[str]) -> list[str]:
    enter = 'echo $$ > "$0/cgroup.procs" 2>/dev/null; exec "$@"'
    return ["sh", "-c", enter, str(group), *command]


def _fill(file: Path) -> None:
    piece = os.urandom(1 << 20)
    with file.open("wb") as opened:
        for _ in range(_FILE_BYTES // len(piece)):
            opened.write(piece)
        os.fsync(opened.fileno())


def _cached(file: Path) -> int:
    """The pages of a file that are in the page cache."""
    fd = os.open(file, os.O_RDONLY)
    try:
        absent = sum(end - start for start, end in absent_pages(fd, 0, _FILE_BYTES))
        return (_FILE_BYTES - absent) // _PAGE
    finally:
        os.close(fd)


def _pace(directory: Path) -> float:
    """Bytes per second that are written to the disk past the page cache."""
    path = directory / "pace"
    began = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", f"count={_PACE_BYTES >> 22}", "oflag=direct"]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    path.unlink()
    return _PACE_BYTES / seconds


def _use_direct_io(directory: Path) -> None:
    """Have the loop device of the filesystem write past the page cache, as a disk does."""
    device = subprocess.run(
        ["findmnt", "-no", "SOURCE", "--target", str(directory)], capture_output=True, text=True
    ).stdout.strip()
    if device.startswith("/dev/loop"):
        subprocess.run(["losetup", "--direct-io=on", device], check=False)


def _drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("1")
