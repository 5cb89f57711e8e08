"""Checks of Redis keys against the table of keys."""

from __future__ import annotations

import re

from tasks.store.keys import TABLE, Key
from worker.runtime.configuration import UNACKED_KEY

#: Ids and queue names may contain any character.
_PATTERNS = {key: re.sub(r"\\\{\w+\\\}", ".+", re.escape(key.pattern)) for key in TABLE}
_LISTED = re.compile("|".join([*_PATTERNS.values(), f"{re.escape(UNACKED_KEY)}(_index|_mutex)?"]), re.DOTALL)


def is_unlisted(key: str) -> bool:
    """Whether this is a key of this program that is not in the table; the key of a queue has another prefix."""
    return key.startswith("forkvm:") and _LISTED.fullmatch(key) is None


def kind_of(key: str) -> Key:
    """The most specific row of the table that matches a key."""
    found = [kind for kind, pattern in _PATTERNS.items() if re.fullmatch(pattern, key, re.DOTALL)]
    return max(found, key=lambda kind: len(kind.pattern))
