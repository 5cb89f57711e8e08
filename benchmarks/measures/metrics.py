"""What metrics and log lines cost: processor time of workers that differ in nothing else, and do the same forks.

The workers run at the same time, each on a database of its own, and take turns. All processor time that their processes
take in a slice of time is compared, so what they do behind a result counts too. What each takes without forks is
measured in slices of its own and subtracted. Two processes of the same program differ by a percent, for example by
where their memory lies, so the workers are started several times.

That is all that is different, but not precise on a busy machine. So one more worker times the parts of it where they
run (`benchmarks.contenders.timed_parts`), which is precise, but only as complete as the list of parts.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import mean, median
from urllib.request import urlopen

from benchmarks.cases import MINI
from benchmarks.contenders.service import Message, Service, worker_beside
from benchmarks.contenders.timed_parts import COUNT, LINE, REPORT, VARIABLE, read_parts
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.measures.memory import descendants
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, sync
from tasks.names import FORK_TASK

CASES = (MINI,)

#: How often the workers are started.
_STARTS = 12
#: Slices with forks for each way and start, slices without, and how long each is at least, in seconds.
_BUSY_SLICES, _IDLE_SLICES, _SLICE_SECONDS = 20, 10, 1.0
#: Ways to send forks, and how many are sent before their results are waited for.
_WAYS = {"one at a time": 1, "50 at once": 50}
_MOST_PERCENT = 2.0
_SEED = 11

_QUIET = {"FORKVM_LOG": "json", "FORKVM_LOG_LEVEL": "WARNING"}
#: Their places in the list of workers. The last one has both, and times its parts.
_NEITHER, _METRICS, _LOG, _TIMED = range(4)


@dataclass(frozen=True)
class _Slice:
    """What the workers did in one slice of time. The lists have a value for each worker."""

    length: float
    #: Forks of each worker.
    forks: int
    #: Processor time, in seconds.
    used: list[float]
    #: Seconds for which a client waited for the forks.
    waited: list[float]


@dataclass(frozen=True)
class _Start:
    """The slices between one start of the workers and the next."""

    idle: list[_Slice] = field(default_factory=list)
    busy: dict[str, list[_Slice]] = field(default_factory=dict)
    #: Seconds of each part for one fork.
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def of_fork(self, way: str, worker: int) -> list[float]:
        """Processor time of a fork in each slice, in seconds."""
        idle = median(one.used[worker] / one.length for one in self.idle)
        return [(one.used[worker] - idle * one.length) / one.forks for one in self.busy[way]]

    def wait(self, way: str, worker: int) -> list[float]:
        """Seconds for which a client waited for a fork, in each slice."""
        return [one.waited[worker] / one.forks for one in self.busy[way]]


def measure_metrics(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """Processor time of a fork with metrics or log lines, by that without both."""
    starts: list[_Start] = []
    with built(MINI, filesystem) as source:
        for number in range(_STARTS):
            log(f"metrics: {filesystem.name}, start {number + 1} of {_STARTS}")
            with ExitStack() as stack:
                workers = _Workers(stack, filesystem, service, source)
                starts.append(_Start())
                for way, count in _WAYS.items():
                    starts[-1].busy[way] = list(workers.slices(_BUSY_SLICES, count))
                    starts[-1].parts[way] = workers.parts()
                starts[-1].idle.extend(workers.slices(_IDLE_SLICES, 0))
    for way in _WAYS:
        yield from _of_way(f"{filesystem.name}, {way}", starts, way)
    for worker, name in ((_NEITHER, "without metrics"), (_METRICS, f"with metrics, read each {_IDLE_SLICES} s")):
        idle = mean(one.used[worker] / one.length for start in starts for one in start.idle)
        yield Finding(f"{filesystem.name}, an idle worker {name}, processor", idle * 100, "%")


class _Workers:
    """The workers, which run until the stack is left."""

    def __init__(self, stack: ExitStack, filesystem: Filesystem, service: Service, source: Path) -> None:
        self._filesystem, self._source = filesystem, source
        self._address = f"127.0.0.1:{_free_port()}"
        self._parts = service.redis_directory / "parts"
        variants = {
            _NEITHER: _QUIET,
            _METRICS: _QUIET | {"FORKVM_HTTP": self._address},
            _LOG: {"FORKVM_LOG": "json"},
            _TIMED: {"FORKVM_LOG": "json", "FORKVM_HTTP": "127.0.0.1:0", VARIABLE: str(self._parts)},
        }
        self._services = [
            stack.enter_context(worker_beside(service, filesystem.path, number + 1, variants[number]))
            for number in sorted(variants)
        ]
        self._processes = [descendants(one.worker_pid) for one in self._services]
        self._order = random.Random(_SEED)

    def slices(self, number: int, count: int) -> Iterator[_Slice]:
        """Yield slices of time in which the workers take turns with `count` forks each, or do nothing."""
        fan = self._filesystem.path / "fan"
        for n, one in enumerate(self._services):
            (fan / str(n)).mkdir(parents=True)
            one.forget_results()
        sync(self._filesystem)
        forks = 0
        for _ in range(number):
            began, before, at_first = time.monotonic(), self._used(), forks
            waited = [0.0] * len(self._services)
            while time.monotonic() < began + _SLICE_SECONDS:
                if not count:
                    time.sleep(began + _SLICE_SECONDS - time.monotonic())
                    break
                for n in self._order.sample(range(len(self._services)), len(self._services)):
                    names = [fan / str(n) / f"vm-{forks + each:05}" for each in range(count)]
                    requests = [{"source": str(self._source), "destination": str(name)} for name in names]
                    waited[n] += self._services[n].run_all([Message(FORK_TASK, {"request": one}) for one in requests])
                forks += count
            length, after = time.monotonic() - began, self._used()
            used = [late - early for late, early in zip(after, before, strict=True)]
            yield _Slice(length, forks - at_first, used, waited)
        with urlopen(f"http://{self._address}/metrics") as page:  # as Prometheus does now and then
            page.read()
        remove(fan)

    def parts(self) -> dict[str, float]:
        """Seconds of each part for one fork since the last call."""
        time.sleep(1)  # until the last reports are read
        return read_parts(self._parts)

    def _used(self) -> list[float]:
        return [sum(map(processor_seconds, processes)) for processes in self._processes]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def processor_seconds(pid: int) -> float:
    """The processor time of a process and its threads, from its own clock, which counts nanoseconds."""
    seconds: float = time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED; see clock_getcpuclockid(3)
    return seconds


def _of_way(where: str, starts: Sequence[_Start], way: str) -> Iterator[Finding]:
    forks = sum(one.forks for start in starts for one in start.busy[way])
    log(f"metrics: {where}: {forks} forks of each worker")
    fork = median(median(start.of_fork(way, _NEITHER)) for start in starts)
    yield Finding(f"{where}, a fork without metrics and log lines, processor", fork * 1e3, "ms")
    wait = median(median(start.wait(way, _NEITHER)) for start in starts)
    yield Finding(f"{where}, a fork without metrics and log lines, wait of its client", wait * 1e3, "ms")
    for worker, name in ((_METRICS, "metrics"), (_LOG, "log lines")):
        more = [_difference(start.of_fork(way, worker), start.of_fork(way, _NEITHER)) for start in starts]
        later = [_difference(start.wait(way, worker), start.wait(way, _NEITHER)) for start in starts]
        yield Finding(f"{where}, {name}, more processor time", median(more) / fork * 100, "%")
        for what, values in (("processor", more), ("wait of its client", later)):
            yield from _with_interval(f"{where}, {name}, more for a fork, {what}", values)
    parts = {part: [start.parts[way][part] for start in starts] for part in (REPORT, COUNT, LINE)}
    for part, values in parts.items():
        yield from _with_interval(f"{where}, timed in place, {part}", values)
    metrics = median(parts[REPORT]) + median(parts[COUNT])
    yield Finding(
        f"{where}, timed in place, metrics, of the processor time of a fork", metrics / fork * 100, "%", _MOST_PERCENT
    )
    line = median(parts[LINE])
    yield Finding(f"{where}, timed in place, log line, of the processor time of a fork", line / fork * 100, "%")


def _with_interval(what: str, values: Sequence[float]) -> Iterator[Finding]:
    """The median of values in seconds, and how well it is known."""
    yield Finding(what, median(values) * 1e6, "us")
    yield Finding(f"{what}, half of the 95 % interval", half_interval(values) * 1e6, "us")


def _difference(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the differences of pairs."""
    return median(one - other for one, other in zip(values, others, strict=True))


def half_interval(values: Sequence[float]) -> float:
    """Half of the distance between the two values that have the median between them with 95 %, however they vary."""
    ordered, middle, reach = sorted(values), (len(values) - 1) / 2, 0.98 * sqrt(len(values))
    low, high = max(0, round(middle - reach)), min(len(values) - 1, round(middle + reach))
    return (ordered[high] - ordered[low]) / 2
