"""Journals that a test changes, as anyone could who knows the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rewrite_spec(path: Path, **changed: Any) -> None:
    """Replace fields of the job in the journal at `path`. The checksum is removed, which a journal may lack."""
    journal = json.loads(path.read_bytes())
    del journal["check"]
    path.write_text(json.dumps(journal | {"spec": journal["spec"] | changed}))
