"""Results as text lines, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tasks.copier.counted import counted
from tasks.copier.errors import describe
from worker.terminal.printing import ShowProgress, printable

if TYPE_CHECKING:
    from tasks.copier.campaign.spec import CampaignProgress, CampaignResult
    from tasks.copier.clone.compare import Comparison
    from tasks.copier.estimate.estimate import Estimate
    from tasks.copier.fork_spec import ForkResult
    from tasks.copier.progress import Progress
    from tasks.copier.report import FileResult

#: Failures of a campaign in the text output. `forkvm forks --failed` lists all.
_SHOWN_FAILURES = 10
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def print_usage_error(error: click.ClickException) -> None:
    """Print a usage error and the usage of the command on stderr. Control characters in it are escaped."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        print(error.ctx.get_usage(), file=sys.stderr)
        print(f"Try '{error.ctx.command_path} --help' for help.\n", file=sys.stderr)
    print(f"Error: {printable(error.format_message())}", file=sys.stderr)


def size(count: int) -> str:
    """A number of bytes with a unit: 1.5 GiB."""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return counted(count, "byte") if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def result_lines(result: ForkResult) -> Iterator[str]:
    """A ForkResult as text lines."""
    files, count, seconds = result["files"], result["bytes"], result["seconds"]
    yield f"{result['status']}: {result['source']} -> {result['destination']} in {seconds['total']:.3f} s"
    yield f"  id        {result['fork_id']}"
    if result["subvolume"]:
        yield "  subvolume made by a btrfs snapshot; `btrfs subvolume delete` removes it quickly"
    if result["error"] is not None:
        yield f"  error     {describe(result['error'])}"
    yield f"  entries   {files['total']}: {_by_kind(files)}"
    yield (
        f"  bytes     {size(count['logical'])} logical, {size(count['reflinked'])} reflinked, "
        f"{size(count['copied'])} copied"
    )
    if result["fallback"] is not None:
        yield f"  fallback  {result['fallback']['reason']} (first at {result['fallback']['path']})"
    if result["metadata_lost"]:
        first, number = result["metadata_lost"][0], result["metadata_lost_total"]
        where = f"first {first['what']} of {first['path']}"
        yield f"  lost      {counted(number, 'item')} of metadata that the destination cannot store ({where})"
    steps = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items() if name != "total")
    yield f"  seconds   {steps}; {counted(result['chunks'], 'chunk')}"


def estimate_lines(found: Estimate) -> Iterator[str]:
    """An Estimate as text lines."""
    count, seconds = found["bytes"], found["seconds"]
    why = f" ({found['reason']})" if found["reason"] else ""
    yield f"{found['method']}: {found['source']} -> {found['destination']}{why}"
    files, extents = counted(found["files"], "file"), counted(found["extents"], "extent")
    yield f"  entries   {found['entries']}, {files} with {extents}"
    yield f"  bytes     {size(count['logical'])} logical, {size(count['allocated'])} allocated"
    free = "" if found["free_bytes"] is None else f" of {size(found['free_bytes'])} free"
    yield f"  to copy   {size(count['to_copy'])}{free}; {'fits' if found['fits'] else 'DOES NOT FIT'}"
    yield f"  seconds   {seconds['low']:.3f} to {seconds['high']:.3f}"
    for warning in found["warnings"]:
        yield f"  warning   {warning['message']}"


def file_line(result: FileResult) -> str:
    """A FileResult as a text line."""
    error = result["error"]
    what = f"FAILED {describe(error)}" if error is not None else result["method"]
    reason = f"  ({result['reason']})" if result["reason"] else ""
    copied = f", {size(result['copied_bytes'])} copied" if result["copied_bytes"] else ""
    return f"{what:<9} {size(result['bytes']):>11}{copied}  {result['path']}{reason}"


def campaign_lines(result: CampaignResult) -> Iterator[str]:
    """A CampaignResult as text lines."""
    forks, count, seconds = result["forks"], result["bytes"], result["seconds"]
    yield f"{result['status']}: {result['source']} -> {counted(forks['total'], 'fork')} in {seconds['total']:.3f} s"
    yield f"  id        {result['campaign_id']}"
    if result["error"] is not None:
        yield f"  error     {describe(result['error'])}"
    yield f"  forks     {_by_kind(forks)}; {result['forks_per_second']:.1f} a second"
    yield f"  entries   {result['files']['total']}: {_by_kind(result['files'])}"
    yield (
        f"  bytes     {size(count['logical'])} logical, {size(count['reflinked'])} reflinked, "
        f"{size(count['copied'])} copied"
    )
    for failure in result["failures"][:_SHOWN_FAILURES]:
        yield f"  failed    {failure['fork_id']}: {describe(failure['error'])}"
    unseen = forks["failed"] - _SHOWN_FAILURES
    if unseen > 0:
        yield f"  failed    and {unseen} more: forkvm forks {result['campaign_id']} --failed"


def any_result_lines(result: ForkResult | CampaignResult) -> Iterator[str]:
    """The result of a fork or campaign as text lines."""
    return campaign_lines(result) if "campaign_id" in result else result_lines(result)


def comparison_lines(source: str, clone: str, found: Comparison) -> Iterator[str]:
    """A Comparison as text lines."""
    for findings in (found.differences, found.unread):
        for finding in findings.first:
            yield f"{finding.path}: {finding.what}"
        if findings.count > len(findings.first):
            yield f"and {findings.count - len(findings.first)} more"
    verdict = "differ" if found.differences.count else "are the same"
    if found.unread.count:
        verdict = f"{'differ, and ' if found.differences.count else ''}could not be compared completely"
    yield f"{source} and {clone} {verdict}: {counted(found.entries, 'entry', 'entries')}, {size(found.bytes_logical)}"
    unmapped = f" (the extents of {counted(found.unmapped_files, 'file')} are unknown)" if found.unmapped_files else ""
    yield f"on disk: {size(found.bytes_mapped)}, {size(found.bytes_shared)} of them shared{unmapped}"


def comparison_record(source: str, clone: str, found: Comparison) -> dict[str, Any]:
    """A Comparison as JSON data."""
    return {
        "source": source,
        "clone": clone,
        "same": found.same,
        "entries": found.entries,
        "differences": [finding._asdict() for finding in found.differences.first],
        "differences_total": found.differences.count,
        "unread": [finding._asdict() for finding in found.unread.first],
        "unread_total": found.unread.count,
        "bytes": {"logical": found.bytes_logical, "mapped": found.bytes_mapped, "shared": found.bytes_shared},
        "unmapped_files": found.unmapped_files,
    }


def fork_line(result: ForkResult) -> str:
    """The result of one fork of a campaign as a text line."""
    error = result["error"]
    what = "" if error is None else f"  {describe(error)}"
    return f"{result['status']:<9} {result['fork_id']}  {result['destination']}{what}"


def progress_line(job_id: str, progress: Progress | CampaignProgress) -> str:
    """The progress of a fork or campaign as a text line."""
    if "forks_total" in progress:
        left = "" if progress["eta_seconds"] is None else f", {progress['eta_seconds']:.0f} s left"
        failed = f", {progress['forks_failed']} failed" if progress["forks_failed"] else ""
        return f"{job_id}: {progress['forks_done']} of {counted(progress['forks_total'], 'fork')}{failed}{left}"
    entries = counted(progress["files_total"], "entry", "entries")
    return (
        f"{job_id}: {progress['phase']}, {progress['files_done']} of {entries}, "
        f"{size(progress['bytes_done'])} of {size(progress['bytes_total'])}"
    )


def _by_kind(counts: Mapping[str, int]) -> str:
    """The counts that are not zero, without the total: `3 reflinked, 1 skipped`."""
    words = {"directories": "directory"}  # the others have one form
    shown = [(number, name) for name, number in counts.items() if name != "total" and number]
    return ", ".join(counted(number, words.get(name, name), name) for number, name in shown) or "none"


@contextmanager
def progress_bar() -> Iterator[ShowProgress]:
    """Yield a function that shows a progress bar on stderr; it does nothing if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    # Imported here: it takes 50 ms, which scripts save.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    # No refresh thread, because a local fork starts child processes meanwhile.
    with Bars(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bars:
        task = bars.add_task("plan", total=None, amount="")

        def show(progress: Progress | CampaignProgress) -> None:
            bars.update(task, refresh=True, **_bar_of(progress, bars.tasks[task].speed))

        yield show


def _bar_of(progress: Progress | CampaignProgress, pace: float | None) -> dict[str, Any]:
    """The fields of the bar. `pace` is its measured speed, in bytes or forks a second."""
    if "forks_total" in progress:
        failed = f", {progress['forks_failed']} failed" if progress["forks_failed"] else ""
        return {
            "description": "forks",
            "completed": progress["forks_done"],
            "total": progress["forks_total"],
            "amount": f"{progress['forks_done']}/{progress['forks_total']}{failed}, {pace or 0:.0f}/s",
        }
    entries = (
        f" {progress['files_done']}/{counted(progress['files_total'], 'entry', 'entries')}"
        if progress["files_total"]
        else ""
    )
    return {
        "description": f"{progress['phase']}{entries}",
        "completed": progress["bytes_done"],
        "total": progress["bytes_total"] or None,
        "amount": f"{size(progress['bytes_done'])}/{size(progress['bytes_total'])}, {size(int(pace or 0))}/s",
    }
