"""`python -m benchmarks`: the table, or what else is asked for."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import (
    campaigns,
    filesystems,
    first_file,
    growth,
    host,
    memory,
    messages,
    record,
    report,
    singles,
    snapshot,
    subjects,
)
from benchmarks.cases import CASES, ONE, Case
from benchmarks.filesystems import KINDS, Filesystem, Unavailable
from benchmarks.picture import draw
from benchmarks.report import Finding
from benchmarks.rounds import Row, run_in_turn
from benchmarks.same import Differs
from benchmarks.say import say
from benchmarks.service import NoService, Service, running_service
from benchmarks.subjects import PEERS, Subject, SubjectFailed

_ROUNDS = 7
#: What can be measured in place of the table: memory at a million files; time per file at a million files and at ten
#: thousand; the largest message and Redis value; the time until the first file is cloned; a snapshot of a subvolume; a
#: thousand small forks beside as many empty tasks; campaigns beside cp; a campaign of a hundred thousand forks.
_EXTRAS = ("memory", "growth", "messages", "first-file", "snapshot", "singles", "campaigns", "large-campaign")
#: What `--quick` leaves of it.
_QUICK_ROUNDS = 2
_QUICK_CASES = ("inst", "tree")
#: Exit code after Ctrl-C or TERM.
_INTERRUPTED = 130
#: The filesystem of what is measured on request, but for the dense file's memory, which is copied on ext4.
_EXTRA_KIND = "xfs"
#: But what a small fork costs, on both that reflink.
_REFLINK_KINDS = ("xfs", "btrfs")


@dataclass(frozen=True)
class _Plan:
    """What to measure."""

    kinds: Sequence[str]
    cases: Sequence[Case]
    peers: Sequence[str]
    rounds: int
    #: A directory to measure in, in place of filesystems of our own.
    directory: Path | None
    #: Whose disk the filesystems take.
    images: Path


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--quick",
    is_flag=True,
    help=f"{' and '.join(_QUICK_CASES)}, {_QUICK_ROUNDS} rounds, no peers but cp: under two minutes.",
)
@click.option("--rounds", type=click.IntRange(1), help=f"How often each subject runs (default {_ROUNDS}).")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only this; may be repeated.")
@click.option("--filesystem", "kinds", multiple=True, type=click.Choice(KINDS), help="Only on this; may be repeated.")
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice([*PEERS, "none"]), help="Beside cp, only this; may be repeated."
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure in this directory, as it is without root; else on filesystems made for it.",
)
@click.option(
    "--work-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the images of filesystems lie (default $TMPDIR).",
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="All figures, as JSON; - is stdout. A file keeps what it holds of this machine and is not measured again.",
)
@click.option("--svg", "svg_path", metavar="FILE", help="The table, as a picture, with what the JSON file kept.")
@click.option(
    "--measure", "extras", multiple=True, type=click.Choice(_EXTRAS), help="In place of the table; may be repeated."
)
@click.option("--table", "with_table", is_flag=True, help="The table too, where other things are asked for.")
def main(
    quick: bool,
    rounds: int | None,
    cases: tuple[str, ...],
    kinds: tuple[str, ...],
    peers: tuple[str, ...],
    directory: Path | None,
    work_dir: Path | None,
    json_path: str | None,
    svg_path: str | None,
    extras: tuple[str, ...],
    with_table: bool,
) -> None:
    """Measure forkvm beside its peers and the limit, on filesystems that are made for it and gone afterwards."""
    plan = _Plan(
        kinds=("the directory",) if directory is not None else kinds or KINDS,
        cases=[CASES[name] for name in cases or (_QUICK_CASES if quick else CASES)],
        peers=[name for name in peers or (() if quick else PEERS) if name != "none"],
        rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        directory=directory,
        images=directory or work_dir or Path(tempfile.gettempdir()),
    )
    try:
        kept = record.read(json_path)
    except (OSError, ValueError) as error:
        sys.exit(f"bench: {json_path}: {error}")
    if host.takes_memory_back():
        say(host.WARNING)
    # TERM ends it as Ctrl-C does: through every with block, and with a table of what was measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    rows: list[Row] = []
    findings: list[Finding] = []
    failed: list[str] = []
    interrupted = False
    try:
        with ExitStack() as stack:
            root = stack.enter_context(_root(directory))
            service = _service(stack, root)
            if with_table or not extras:
                for row in _table(plan, root, service):
                    rows.append(row)
                    failed += row.failures.values()
            for name in extras:
                try:
                    findings += _MEASURES[name](plan, root, service)
                except (Unavailable, SubjectFailed, Differs) as error:
                    say(f"{name} FAILED: {error}")
                    failed.append(str(error))
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        report.print_table(rows, plan.rounds, plan.peers)
    if findings:
        report.print_findings(findings)
    if json_path is not None:
        rows = record.add_to(json_path, kept, rows, findings)
    if svg_path is not None:
        Path(svg_path).write_text(draw(rows, os.cpu_count() or 0), encoding="utf-8")
    if interrupted:
        say("interrupted: the rest was not measured")
        sys.exit(_INTERRUPTED)
    say(f"done in {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed else 0)


@contextmanager
def _root(directory: Path | None) -> Iterator[Path]:
    """The directory that all filesystems are below, and that the worker serves."""
    if directory is None:
        if os.geteuid() != 0:
            sys.exit("bench: not root, so no filesystems can be made: name a directory to measure in with --dir")
        try:
            filesystems.enter_mount_namespace()
        except Unavailable as error:
            sys.exit(f"bench: {error}: name a directory to measure in with --dir")
    with tempfile.TemporaryDirectory(prefix="forkvm-bench-", dir=directory) as path:
        yield Path(path).resolve()


def _service(stack: ExitStack, root: Path) -> Service | None:
    try:
        return stack.enter_context(running_service(root))
    except NoService as error:
        say(f"{error}; the columns of forkvm through Redis stay empty")
        return None


def _table(plan: _Plan, root: Path, service: Service | None) -> Iterator[Row]:
    between = service.forget_results if service is not None else lambda: None
    for kind in plan.kinds:
        try:
            with _filesystem(plan, kind, plan.cases, root) as (filesystem, cases):
                subjects_here = _subjects(plan, filesystem, service)
                for case in cases:
                    say(f"{case.name} on {filesystem.name}: {case.about}")
                    yield run_in_turn(case, filesystem, subjects_here, plan.rounds, between)
        except Unavailable as error:
            say(f"{error}; nothing is measured on {kind}")


def _subjects(plan: _Plan, filesystem: Filesystem, service: Service | None) -> list[Subject]:
    found = [subjects.engine()]
    if service is not None:
        found.append(service.subject())
    found += [subjects.cp(filesystem.reflink), subjects.limit(filesystem.reflink)]
    for name in plan.peers:
        peer = subjects.peer(name, filesystem.reflink)
        if peer is None:
            say(f"no {name} on this machine; its column stays empty")
        else:
            found.append(peer)
    return found


@contextmanager
def _filesystem(
    plan: _Plan, kind: str, cases: Sequence[Case], root: Path
) -> Iterator[tuple[Filesystem, Sequence[Case]]]:
    """A filesystem of this kind, or else the directory that was given, and the cases that it has room for.

    Raises Unavailable.
    """
    room = filesystems.room_for(kind, plan.images)
    fitting = [case for case in cases if case.room <= room]
    for case in cases:
        if case not in fitting:
            say(f"{case.name} needs {case.room >> 30} GiB on {kind}, and there are {max(0, room) >> 30}; left out")
    if not fitting:
        raise Unavailable("no room")
    if plan.directory is not None:
        with filesystems.given(root) as filesystem:
            yield filesystem, fitting
    else:
        with filesystems.made(kind, max(case.room for case in fitting), root, plan.images) as filesystem:
            yield filesystem, fitting


# -- what is measured on request


def _memory(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    found: list[Finding] = []
    for kind, case in zip((_EXTRA_KIND, "ext4"), memory.CASES, strict=True):
        with _filesystem(plan, kind, [case], root) as (filesystem, _):
            found += memory.measure_memory(case, filesystem, service)
    return found


def _growth(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(plan, root, growth.CASES, lambda filesystem: growth.measure_growth(filesystem, service))


def _messages(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    if service is None:
        say("no messages without Redis")
        return []
    return _on_one(plan, root, messages.CASES, lambda filesystem: messages.measure_messages(filesystem, service))


def _first_file(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(plan, root, first_file.CASES, lambda filesystem: first_file.measure_first_file(filesystem, service))


def _snapshot(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(
        plan, root, snapshot.CASES, lambda filesystem: snapshot.measure_snapshot(filesystem, service), "btrfs"
    )


def _singles(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_each_reflink(plan, root, service, singles.CASES, singles.measure_singles)


def _campaigns(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_each_reflink(plan, root, service, campaigns.CASES, campaigns.measure_campaigns)


def _on_each_reflink(
    plan: _Plan,
    root: Path,
    service: Service | None,
    cases: Sequence[Case],
    measure: Callable[[Filesystem, Service], Iterator[Finding]],
) -> list[Finding]:
    if service is None:
        say("nothing to measure without Redis")
        return []
    found: list[Finding] = []
    kinds = plan.kinds if plan.directory is not None else [kind for kind in _REFLINK_KINDS if kind in plan.kinds]
    for kind in kinds:
        with _filesystem(plan, kind, cases, root) as (filesystem, _):
            found += measure(filesystem, service)
    return found


def _on_one(
    plan: _Plan,
    root: Path,
    cases: Sequence[Case],
    measure: Callable[[Filesystem], Iterator[Finding]],
    kind: str = _EXTRA_KIND,
) -> list[Finding]:
    with _filesystem(plan, kind, cases, root) as (filesystem, fitting):
        if len(fitting) < len(cases):
            raise Unavailable("no room")
        return list(measure(filesystem))


def _large_campaign(plan: _Plan, root: Path, service: Service | None) -> list[Finding]:
    if service is None:
        say("no campaigns without Redis")
        return []
    return _on_one(plan, root, [ONE], lambda filesystem: campaigns.measure_large_campaign(filesystem, service))


_MEASURES: dict[str, Callable[[_Plan, Path, Service | None], list[Finding]]] = {
    "memory": _memory,
    "growth": _growth,
    "messages": _messages,
    "first-file": _first_file,
    "snapshot": _snapshot,
    "singles": _singles,
    "campaigns": _campaigns,
    "large-campaign": _large_campaign,
}


if __name__ == "__main__":
    main()
