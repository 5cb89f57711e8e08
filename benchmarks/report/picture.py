"""The table as an SVG picture: bars of the time as a ratio to cp, for light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from benchmarks.contenders.programs import COPYTREE, CP, ENGINE, LIMIT, QUEUE, RSYNC, XARGS
from benchmarks.rounds import Row

#: Lengths are pixels.
_WIDTH = 900
_MARGIN = 24
_COLUMNS = 2
_GAP = 32
_COLUMN = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
_LABEL = 120
_VALUE = 56
_BARS = _COLUMN - _LABEL - _VALUE
_BAR, _STEP = 11, 16
_DIGIT = 7
_TOP, _HEADER, _BELOW = 92, 24, 22

#: Longer bars are cut at this ratio: beside one of 400 the others would be invisible.
_LONGEST = 3.0

#: What is drawn, in this order: the contender, its label, its CSS class.
_SERIES = (
    (ENGINE, "forkvm", "engine"),
    (QUEUE, "forkvm, via Redis", "queue"),
    (XARGS, "xargs -P2 cp", "peer"),
    (RSYNC, "rsync -aS", "peer"),
    (COPYTREE, "shutil.copytree", "peer"),
    (LIMIT, "bare loop (limit)", "limit"),
)

_STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; fill: #1f2328; }
  .title { font-size: 18px; font-weight: 600; }
  .case { font-size: 13px; font-weight: 600; }
  .quiet { fill: #59636e; }
  .page { fill: #ffffff; }
  .engine { fill: #0969da; }
  .queue { fill: #54a3f5; }
  .peer { fill: #afb8c1; }
  .limit { fill: #2da44e; }
  .cp { stroke: #1f2328; stroke-width: 1; stroke-dasharray: 3 3; }
  .cut { stroke: #ffffff; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .quiet { fill: #9198a1; }
    .page { fill: #0d1117; }
    .engine { fill: #4493f8; }
    .queue { fill: #1f5fae; }
    .peer { fill: #565e68; }
    .limit { fill: #3fb950; }
    .cp { stroke: #e6edf3; }
    .cut { stroke: #0d1117; }
  }
"""


def draw(rows: Sequence[Row], cores: int) -> str:
    """The SVG document: one group of bars for each row, two groups side by side."""
    drawn = [row for row in rows if row.median(CP) is not None]
    parts: list[str] = []
    y = _TOP
    for at in range(0, len(drawn), _COLUMNS):
        line = drawn[at : at + _COLUMNS]
        for column, row in enumerate(line):
            parts += _group(row, _MARGIN + column * (_COLUMN + _GAP), y)
        y += max(_height(row) for row in line) + _BELOW
    rounds = [len(row.seconds[CP]) for row in drawn]
    fewest, most = min(rounds, default=0), max(rounds, default=0)
    how_many = f"{most}" if fewest == most else f"{fewest} to {most}"
    note = f"Medians of {how_many} rounds on {cores} cores; shorter is faster. Dashed: cp -a"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}">',
            "<title>Time to fork a directory, as a ratio to cp -a</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="page" width="{_WIDTH}" height="{y}" rx="6"/>',
            _text(_MARGIN, 36, "Time to fork a directory, as a ratio to cp -a", "title"),
            _text(_MARGIN, 58, f"{note} --reflink=always (XFS, btrfs), cp -a --sparse=auto (ext4, tmpfs)", "quiet"),
            *parts,
            "</svg>",
            "",
        ]
    )


def _group(row: Row, x: int, y: int) -> list[str]:
    bars, top, series = x + _LABEL, y + _HEADER, _measured(row)
    line, bottom = bars + _BARS / _LONGEST, top + len(series) * _STEP
    parts = [_text(x, y + 12, f"{row.filesystem} · {row.case}", "case")]
    values: list[str] = []
    for position, (contender, label, style) in enumerate(series):
        bar = top + position * _STEP
        seconds, ratio = row.median(contender) or 0.0, row.ratio(contender, CP) or 0.0
        length = _BARS * min(ratio, _LONGEST) / _LONGEST
        parts.append(_text(bars - 8, bar + 10, label, anchor="end"))
        parts.append(
            f'<rect class="{style}" x="{bars}" y="{bar}" width="{length:.1f}" height="{_BAR}" rx="1.5">'
            f"<title>{escape(label)}: {_milliseconds(seconds)}</title></rect>"
        )
        if ratio > _LONGEST:
            cut = bars + _BARS - 14
            parts.append(f'<path class="cut" d="M{cut} {bar + _BAR + 1}l6 -{_BAR + 2}m4 0l-6 {_BAR + 2}" fill="none"/>')
        value, at = _number(ratio), bars + length
        # A background, since the line of cp may cross the number.
        values.append(
            f'<rect class="page" x="{at + 3:.1f}" y="{bar}" width="{_DIGIT * len(value) + 4}" height="{_BAR}"/>'
        )
        values.append(_text(at + 6, bar + 10, value))
    return [
        *parts,
        f'<line class="cp" x1="{line:.1f}" y1="{top - 5}" x2="{line:.1f}" y2="{bottom}"/>',
        _text(line, y + 12, f"cp {_milliseconds(row.median(CP) or 0.0)}", "quiet", "middle"),
        *values,
    ]


def _measured(row: Row) -> list[tuple[str, str, str]]:
    return [series for series in _SERIES if row.median(series[0]) is not None]


def _height(row: Row) -> int:
    return _HEADER + len(_measured(row)) * _STEP


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"
