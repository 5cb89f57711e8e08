"""Single forks of a small guest under load, beside a ten-line Celery worker that runs cp."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.cases import MINI, TREE
from benchmarks.contenders.load import Load, Target, forkvm, run_load, ten_line_worker
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.measures.memory import descendants
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, sync

CASES = (MINI, TREE)

_ROUNDS = 5
_AT_ONCE = 1_000
_MOST_AT_ONCE = 0.35
#: Forks a second, their number, and the largest ratios of the median and of the 99th percentile.
_RATES = ((20, 100, 0.7, 1.0), (60, 300, 0.8, 1.0))
#: The search for the highest rate: its first rate, its step, the seconds of each, the latency that ends it.
_FIRST_RATE, _STEP, _RATE_SECONDS, _SLOW_SECONDS = 40.0, 1.25, 3.0, 0.1
_LEAST_RATE_RATIO = 2.5
_MOST_COMMANDS = 10.0
_MOST_BESIDE_LONG = 2.0
_IDLE_SECONDS = 20.0
_MOST_IDLE_COMMANDS, _MOST_IDLE_PERCENT = 3.0, 0.5


def measure_load(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """Latencies at fixed rates, the highest rate, a thousand forks at once, and the load of an idle worker."""
    with built(MINI, filesystem) as source, ten_line_worker(service) as other:
        runs = _Runs(filesystem, service, source)
        pair = (forkvm(service), other)
        for target in pair:
            runs.load(target, 50, None)
        yield from _at_rates(runs, pair)
        yield from _at_once(runs, pair)
        yield from _highest_rate(runs, pair)
        yield from _beside_a_long_one(runs, pair[0])
    yield from _idle(filesystem, service)


class _Runs:
    """Loads on one filesystem, each into a directory of its own that is removed."""

    def __init__(self, filesystem: Filesystem, service: Service, source: Path) -> None:
        self.filesystem, self.service, self.source = filesystem, service, source
        self.where = filesystem.name

    def load(self, target: Target, count: int, rate: float | None, long: Path | None = None) -> Load:
        """One load of `count` forks.

        `long`: the source of a large fork, which is sent in the middle and not counted.
        """
        fan = self.filesystem.path / "fan"
        fan.mkdir()
        sync(self.filesystem)
        self.service.forget_results()
        requests = [{"source": str(self.source), "destination": str(fan / f"vm-{n:04}")} for n in range(count)]
        if long is not None:
            requests.insert(count // 2, {"source": str(long), "destination": str(fan / "long")})
        found = run_load(self.service, target, requests, rate)
        remove(fan)
        if long is not None:
            del found.latencies[count // 2]
        return found


def _at_rates(runs: _Runs, pair: tuple[Target, Target]) -> Iterator[Finding]:
    for rate, count, most_median, most_last in _RATES:
        found: dict[Target, list[Load]] = {target: [] for target in pair}
        for number in range(_ROUNDS):
            log(f"load: {runs.where}, {rate} a second, round {number + 1} of {_ROUNDS}")
            for target in pair:
                found[target].append(runs.load(target, count, rate))
        for percent, most in ((50, most_median), (99, most_last)):
            values = [median(load.percentile(percent) for load in found[target]) * 1e3 for target in pair]
            what = f"{runs.where}, {rate} forks a second, p{percent}"
            for target, value in zip(pair, values, strict=True):
                yield Finding(f"{what}: {target.name}", value, "ms")
            yield Finding(f"{what}: forkvm by ten lines", values[0] / values[1], "times", most)


def _at_once(runs: _Runs, pair: tuple[Target, Target]) -> Iterator[Finding]:
    found: dict[Target, list[float]] = {target: [] for target in pair}
    sending, commands = _commands_of_sending(runs.service), []
    for number in range(_ROUNDS):
        log(f"load: {runs.where}, {_AT_ONCE} at once, round {number + 1} of {_ROUNDS}")
        for target in pair:
            before = _commands(runs.service)
            found[target].append(runs.load(target, _AT_ONCE, None).seconds)
            if target is pair[0]:
                commands.append((_commands(runs.service) - before) / _AT_ONCE - sending)
    values = [median(found[target]) for target in pair]
    what = f"{runs.where}, {_AT_ONCE:,} forks at once"
    for target, value in zip(pair, values, strict=True):
        yield Finding(f"{what}: {target.name}", value, "s")
    yield Finding(f"{what}: forkvm by ten lines", values[0] / values[1], "times", _MOST_AT_ONCE)
    yield Finding(f"{what}: commands to Redis a fork, those of scripts too", median(commands), "", _MOST_COMMANDS)


def _highest_rate(runs: _Runs, pair: tuple[Target, Target]) -> Iterator[Finding]:
    """The highest rate of each at which the 99th percentile stays below 100 ms; each rate has two tries."""
    highest = []
    for target in pair:
        rate, fast = _FIRST_RATE, 0.0
        while any(_is_fast(runs, target, rate) for _ in range(2)):
            rate, fast = rate * _STEP, rate
        highest.append(fast)
        yield Finding(f"{runs.where}, highest rate with p99 below 100 ms: {target.name}", fast, "forks/s")
    if highest[0]:
        what = f"{runs.where}, highest rate with p99 below 100 ms: ten lines by forkvm"
        yield Finding(what, highest[1] / highest[0], "times", 1 / _LEAST_RATE_RATIO)


def _is_fast(runs: _Runs, target: Target, rate: float) -> bool:
    return runs.load(target, int(rate * _RATE_SECONDS), rate).percentile(99) < _SLOW_SECONDS


def _beside_a_long_one(runs: _Runs, target: Target) -> Iterator[Finding]:
    with built(TREE, runs.filesystem) as tree:
        alone, beside = [], []
        for _ in range(_ROUNDS):
            alone.append(runs.load(target, _AT_ONCE, None).percentile(99))
            beside.append(runs.load(target, _AT_ONCE, None, tree).percentile(99))
    what = f"{runs.where}, p99 of {_AT_ONCE:,} forks at once, with one of {TREE.name} among them, by p99 without"
    yield Finding(what, median(beside) / median(alone), "times", _MOST_BESIDE_LONG)


def _idle(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    pids = [service.worker_pid, *descendants(service.worker_pid)]
    commands, used = _commands(service), sum(map(_cpu_seconds, pids))
    time.sleep(_IDLE_SECONDS)
    used, commands = sum(map(_cpu_seconds, pids)) - used, _commands(service) - commands - 1
    yield Finding(
        f"{filesystem.name}, an idle worker: commands a second", commands / _IDLE_SECONDS, "", _MOST_IDLE_COMMANDS
    )
    yield Finding(f"{filesystem.name}, an idle worker: processor", used / _IDLE_SECONDS * 100, "%", _MOST_IDLE_PERCENT)


def _commands(service: Service) -> int:
    return int(service.redis.info("stats")["total_commands_processed"])


def _commands_of_sending(service: Service) -> float:
    """Commands to Redis that a client needs for one message and its result."""
    count, before = 100, _commands(service)
    for _ in range(count):
        service.client.send_task("nothing", queue="nowhere")
    found = (_commands(service) - before - 1) / count
    service.redis.delete("nowhere")
    return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
