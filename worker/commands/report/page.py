"""A report as one HTML page: no script, nothing to load, and every name escaped.

The page forbids itself by its Content-Security-Policy what it does not need, so a name that was not escaped could still
load nothing and run nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import escape
from importlib import resources

from tasks.contract.remedies import remedy_text
from tasks.copier.errors import ErrorRecord
from worker.commands.output import size
from worker.commands.report.contents import Contents
from worker.commands.report.durations import Bin, span
from worker.terminal.printing import printable

#: The histogram's size in units of its own, which the browser scales.
_BAR_WIDTH, _BAR_GAP, _CHART_HEIGHT, _LABEL_HEIGHT = 36, 4, 120, 20
#: A name in a remedy.
_CODE = re.compile(r"`([^`]+)`")
#: Put before each slash of a path: a browser may break the line there.
_BREAK = "<wbr>"


def page(contents: Contents) -> str:
    """The whole page."""
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    title = f"{contents.kind} {contents.id}"
    sections = (
        _outcome(contents),
        _failures(contents),
        _phases(contents),
        _methods(contents),
        _histogram(contents),
        _slowest(contents),
    )
    body = "\n".join(line for section in sections for line in section)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)} · forkvm</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    """`text` for an element or attribute, with control characters as backslash escapes."""
    return escape(printable(text))


def _path(text: str) -> str:
    """The same for an element, which a browser may break before each slash."""
    return _text(text).replace("/", f"{_BREAK}/")


def _outcome(contents: Contents) -> Iterator[str]:
    yield f"<h1>{_text(contents.kind)} <code>{_path(contents.id)}</code></h1>"
    yield f'<p><strong class="status {_text(contents.status)}">{_text(contents.status)}</strong>'
    yield f"<code>{_path(contents.source)}</code> → <code>{_path(contents.destination)}</code></p>"
    yield '<dl class="facts">'
    for name, value in contents.facts:
        yield f"<div><dt>{_text(name)}</dt><dd>{_path(value)}</dd></div>"
    yield "</dl>"


def _error(error: ErrorRecord) -> str:
    path = f": <code>{_path(error['path'])}</code>" if error["path"] else ""
    fix = _CODE.sub(r"<code>\1</code>", _text(remedy_text(error["code"])))
    what_to_do = f'<p class="fix">{fix}</p>' if fix else ""
    return f"<p><strong>{_text(error['code'])}</strong>{path}: {_path(error['message'])}</p>{what_to_do}"


def _phases(contents: Contents) -> Iterator[str]:
    yield "<h2>Time per phase</h2>"
    most = max((seconds for _, seconds in contents.phases), default=0.0)
    rows = ((name, span(seconds), _bar(seconds, most)) for name, seconds in contents.phases)
    yield from _table(("phase", "time", ""), ((_text(name), time, bar) for name, time, bar in rows))


def _methods(contents: Contents) -> Iterator[str]:
    yield "<h2>Methods</h2>"
    most = max((method.entries for method in contents.methods), default=0)
    yield from _table(
        ("method", "entries", "size", ""),
        (
            (
                _text(method.name),
                f"{method.entries:,}",
                "" if method.bytes is None else size(method.bytes),
                _bar(method.entries, most),
            )
            for method in contents.methods
        ),
    )


def _histogram(contents: Contents) -> Iterator[str]:
    yield f"<h2>Durations of {contents.items}</h2>"
    bins = contents.durations.bins()
    if not bins:
        yield "<p>No duration was measured.</p>"
        return
    count = sum(one.items for one in bins)
    yield f"<p>{count:,} {contents.items}; each bar is labelled with its shortest duration.</p>"
    width = len(bins) * (_BAR_WIDTH + _BAR_GAP)
    label = f"Histogram of the durations of {count} {contents.items}"
    yield f'<div class="scroll"><svg viewBox="0 -16 {width} {_CHART_HEIGHT + _LABEL_HEIGHT + 16}" '
    yield f'style="max-width:{width * 1.6:.0f}px;min-width:{width * 0.8:.0f}px" role="img" aria-label="{label}">'
    most = max(one.items for one in bins)
    for number, one in enumerate(bins):
        yield _column(number * (_BAR_WIDTH + _BAR_GAP), one, most)
    yield "</svg></div>"


def _column(left: int, one: Bin, most: int) -> str:
    height = one.items / most * _CHART_HEIGHT
    middle = left + _BAR_WIDTH / 2
    number = f'<text x="{middle}" y="{_CHART_HEIGHT - height - 4:.1f}">{one.items:,}</text>' if one.items else ""
    return (
        f"<g><title>{span(one.low)} to {span(one.high)}: {one.items:,}</title>"
        f'<rect x="{left}" y="{_CHART_HEIGHT - height:.1f}" width="{_BAR_WIDTH}" height="{height:.1f}"/>{number}'
        f'<text class="label" x="{middle}" y="{_CHART_HEIGHT + 14}">{span(one.low)}</text></g>'
    )


def _slowest(contents: Contents) -> Iterator[str]:
    yield f"<h2>Slowest {contents.items}</h2>"
    if not contents.slowest:
        yield "<p>None.</p>"
        return
    rows = ((f"<code>{_path(item.name)}</code>", span(item.seconds), _text(item.detail)) for item in contents.slowest)
    yield from _table((contents.items, "time", "how"), rows)


def _failures(contents: Contents) -> Iterator[str]:
    yield f"<h2>Failures: {contents.failures_total:,}</h2>"
    for failure in contents.failures:
        yield f'<div class="error"><p><code>{_path(failure.name)}</code></p>{_error(failure.error)}</div>'
    if contents.failures_total > len(contents.failures):
        yield f"<p>The first {len(contents.failures)} are shown.</p>"


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A table; the cells are HTML."""
    yield '<div class="scroll"><table>'
    yield f"<tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
    yield "</table></div>"


def _bar(value: float, most: float) -> str:
    share = value / most if most else 0.0
    return f'<span class="bar" style="width:{share * 100:.1f}%"></span>'
