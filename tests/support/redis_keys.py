"""Checks of Redis keys against the table of keys."""

from __future__ import annotations

import re

from tasks.store.keys import OF_KOMBU, TABLE, Key, Lifetime


def _regex(key: Key) -> str:
    """Ids and names of queues and exchanges may contain any character."""
    return re.sub(r"\\\{\w+\\\}", ".+", re.escape(key.pattern))


_PATTERNS = {key: _regex(key) for key in TABLE}
#: The lists of queues are left out: they could have any name. A global_keyprefix may precede kombu's other keys.
_KOMBU = {key: f".*{_regex(key)}" for key in OF_KOMBU if not key.pattern.startswith("{queue}")}
_OWN = re.compile(r"forkvm:|.*_kombu\.|.*\.pidbox$", re.DOTALL)
_LISTED = re.compile("|".join((*_PATTERNS.values(), *_KOMBU.values())), re.DOTALL)
_WITHOUT_TTL = re.compile(
    "|".join(
        pattern
        for key, pattern in _KOMBU.items()
        if key.lifetime is Lifetime.NEVER and not key.pattern.startswith("forkvm:")
    ),
    re.DOTALL,
)


def is_unlisted(key: str) -> bool:
    """Whether this is a key of this program, or of kombu for it, that is in none of the tables."""
    return _OWN.match(key) is not None and _LISTED.fullmatch(key) is None


def is_permanent(key: str) -> bool:
    """Whether kombu keeps this key when no message is left."""
    return _WITHOUT_TTL.fullmatch(key) is not None


def kind_of(key: str) -> Key:
    """The most specific row of the table that matches a key."""
    found = [kind for kind, pattern in _PATTERNS.items() if re.fullmatch(pattern, key, re.DOTALL)]
    return max(found, key=lambda kind: len(kind.pattern))
