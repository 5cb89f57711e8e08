"""What is read of a request that has not been checked, and may be anything."""

from __future__ import annotations

from typing import Any

#: A worker that refuses a message replaces its request by one with this field, which holds the reason; see
#: `worker.runtime.refused_messages`.
REFUSED = "refused"


def text_of(request: object, field: str) -> str:
    """The text in a field of a request that may be invalid, for messages and failed results; empty if there is none."""
    value: Any = request.get(field) if isinstance(request, dict) else None
    return value if isinstance(value, str) else ""
