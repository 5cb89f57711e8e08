"""The command line of the benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks import filesystems, host
from benchmarks.cases import CASES
from benchmarks.contenders import programs
from benchmarks.contenders.programs import PEERS, Contender, ContenderFailed
from benchmarks.contenders.service import NoService, Service, running_service
from benchmarks.copy_check import CopyDiffers
from benchmarks.filesystems import KINDS, Filesystem, Unavailable
from benchmarks.log import log
from benchmarks.measures import MEASURES
from benchmarks.plan import Plan, open_filesystem
from benchmarks.report import record, tables
from benchmarks.report.picture import draw
from benchmarks.report.tables import Finding
from benchmarks.rounds import Row, run_in_turn

_ROUNDS = 7
#: What `--quick` measures.
_QUICK_ROUNDS = 2
_QUICK_CASES = ("inst", "tree")
#: Exit code after Ctrl-C or SIGTERM.
_INTERRUPTED = 130


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--quick",
    is_flag=True,
    help=f"Only {' and '.join(_QUICK_CASES)}, {_QUICK_ROUNDS} rounds, no other program than cp: under two minutes.",
)
@click.option("--rounds", type=click.IntRange(1), help=f"Number of rounds (default {_ROUNDS}).")
@click.option(
    "--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Measure only this case; repeatable."
)
@click.option(
    "--filesystem",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    help="Measure only on this filesystem; repeatable.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice([*PEERS, "none"]),
    help="Compare only with cp and this program; repeatable.",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure in this directory, for which root is not needed. Default: filesystems on loop devices.",
)
@click.option(
    "--work-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory for the images of filesystems (default $TMPDIR).",
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="Write all figures as JSON; - is stdout. Figures of this machine that are already in the file are kept.",
)
@click.option(
    "--svg", "svg_path", metavar="FILE", help="Write the table as a picture, with the rows that the JSON file kept."
)
@click.option(
    "--measure",
    "extras",
    multiple=True,
    type=click.Choice(list(MEASURES)),
    help="Measure this instead of the table; repeatable.",
)
@click.option("--table", "with_table", is_flag=True, help="Measure the table too, if --measure is given.")
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
    """Compare forkvm with other programs and with the limit, on filesystems that exist only during the run."""
    plan = Plan(
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
        log(host.WARNING)
    # SIGTERM acts like Ctrl-C: every with block is left, and the table shows what was measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    figures = _Figures()
    interrupted = False
    try:
        _measure(plan, extras, figures, with_table=with_table or not extras)
    except KeyboardInterrupt:
        interrupted = True
    _show(plan, figures, kept, json_path, svg_path)
    if interrupted:
        log("interrupted: the rest was not measured")
        sys.exit(_INTERRUPTED)
    log(f"finished after {time.monotonic() - began:.0f} s")
    sys.exit(1 if figures.failures else 0)


@dataclass
class _Figures:
    """What was measured so far."""

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _measure(plan: Plan, extras: Sequence[str], figures: _Figures, *, with_table: bool) -> None:
    """Fill `figures`; after KeyboardInterrupt they hold what was measured until then."""
    with ExitStack() as stack:
        root = stack.enter_context(_root(plan.directory))
        service = _service(stack, root)
        if with_table:
            for row in _table(plan, root, service):
                figures.rows.append(row)
                figures.failures += row.failures.values()
        for name in extras:
            try:
                figures.findings += MEASURES[name](plan, root, service)
            except (Unavailable, ContenderFailed, CopyDiffers) as error:
                log(f"{name} FAILED: {error}")
                figures.failures.append(str(error))


def _show(plan: Plan, figures: _Figures, kept: record.Kept, json_path: str | None, svg_path: str | None) -> None:
    """Print the figures, and write the files that were asked for."""
    rows = figures.rows
    if rows:
        tables.print_table(rows, plan.rounds, plan.peers)
    if figures.findings:
        tables.print_findings(figures.findings)
    if json_path is not None:
        rows = record.add_to(json_path, kept, rows, figures.findings)
    if svg_path is not None:
        Path(svg_path).write_text(draw(rows, os.cpu_count() or 0), encoding="utf-8")


@contextmanager
def _root(directory: Path | None) -> Iterator[Path]:
    """The directory that all filesystems are mounted below; the worker's only root."""
    if directory is None:
        if os.geteuid() != 0:
            sys.exit("bench: only root can make filesystems: name an existing directory with --dir")
        try:
            filesystems.enter_mount_namespace()
        except Unavailable as error:
            sys.exit(f"bench: {error}: name an existing directory with --dir")
    with tempfile.TemporaryDirectory(prefix="forkvm-bench-", dir=directory) as path:
        yield Path(path).resolve()


def _service(stack: ExitStack, root: Path) -> Service | None:
    try:
        return stack.enter_context(running_service(root))
    except NoService as error:
        log(f"{error}: forkvm through Redis is not measured")
        return None


def _table(plan: Plan, root: Path, service: Service | None) -> Iterator[Row]:
    between = service.forget_results if service is not None else lambda: None
    for kind in plan.kinds:
        try:
            with open_filesystem(plan, kind, plan.cases, root) as (filesystem, cases):
                contenders = _contenders(plan, filesystem, service)
                for case in cases:
                    log(f"{case.name} on {filesystem.name}: {case.about}")
                    yield run_in_turn(case, filesystem, contenders, plan.rounds, between)
        except Unavailable as error:
            log(f"{error}: {kind} is not measured")


def _contenders(plan: Plan, filesystem: Filesystem, service: Service | None) -> list[Contender]:
    found = [programs.engine()]
    if service is not None:
        found.append(service.contender())
    found += [programs.cp(filesystem.reflink), programs.limit(filesystem.reflink)]
    for name in plan.peers:
        peer = programs.peer(name, filesystem.reflink)
        if peer is None:
            log(f"{name} is not installed: not measured")
        else:
            found.append(peer)
    return found


if __name__ == "__main__":
    main()
