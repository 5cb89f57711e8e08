"""The figures as JSON, kept between runs: all take hours, so they can be measured in parts."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import CASES
from benchmarks.contenders.programs import CP
from benchmarks.filesystems import KINDS
from benchmarks.report.tables import Finding
from benchmarks.report.targets import targets
from benchmarks.rounds import Row

#: The path that means standard output, where nothing is kept.
_STDOUT = "-"


class Kept(NamedTuple):
    """The figures of earlier runs."""

    rows: list[Row]
    findings: list[Finding]


def read(path: str | None) -> Kept:
    """The figures in a file; none if it does not exist, or if another machine measured them.

    Raises OSError, and ValueError if the file holds something else.
    """
    if path is None or path == _STDOUT or not os.path.exists(path):
        return Kept([], [])
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [
            Row(
                row["case"],
                row["filesystem"],
                row["reflink"],
                {name: [ms / 1e3 for ms in rounds] for name, rounds in row["rounds_ms"].items()},
                row["failures"],
                row["measured_at"],
            )
            for row in data["rows"]
        ]
        names = [field.name for field in fields(Finding)]
        findings = [Finding(**{name: finding[name] for name in names}) for finding in data["findings"]]
        return Kept(rows, findings) if data["machine"] == _machine() else Kept([], [])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a file of benchmark figures: {error!r}; name another file") from None


def add_to(path: str, kept: Kept, rows: Sequence[Row], findings: Sequence[Finding]) -> list[Row]:
    """Write the figures, with those of `kept` that were not measured again; returns all rows of the file.

    `path` may be "-" for standard output. Raises OSError.
    """
    old_rows, old_findings = kept
    all_rows = {**{(row.filesystem, row.case): row for row in old_rows}, **{(r.filesystem, r.case): r for r in rows}}
    ordered = sorted(all_rows.values(), key=_position)
    all_findings = {**{finding.what: finding for finding in old_findings}, **{f.what: f for f in findings}}
    text = json.dumps(_as_data(ordered, list(all_findings.values())), indent=1) + "\n"
    if path == _STDOUT:
        sys.stdout.write(text)
    else:
        new = Path(f"{path}.new")
        new.write_text(text, encoding="utf-8")
        new.rename(path)
    return ordered


def _position(row: Row) -> tuple[int, int, str]:
    """Sort key of a row: the order of the table."""
    kind = KINDS.index(row.filesystem) if row.filesystem in KINDS else len(KINDS)
    return kind, list(CASES).index(row.case), row.filesystem


def _as_data(rows: Sequence[Row], findings: Sequence[Finding]) -> dict[str, Any]:
    """Times are in milliseconds."""
    return {
        "machine": _machine(),
        "rows": [
            {
                "filesystem": row.filesystem,
                "case": row.case,
                "measured_at": row.measured_at,
                "reflink": row.reflink,
                "median_ms": {name: round((row.median(name) or 0) * 1e3, 3) for name in row.seconds},
                "rounds_ms": {name: [round(s * 1e3, 3) for s in seconds] for name, seconds in row.seconds.items()},
                "ratio_to_cp": {name: _rounded(row.ratio(name, CP)) for name in row.seconds},
                "targets": [
                    {**asdict(target), "value": round(target.value, 4), "met": target.met} for target in targets(row)
                ],
                "failures": row.failures,
            }
            for row in rows
        ],
        "findings": [{**asdict(finding), "met": finding.met} for finding in findings],
    }


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
