"""A number with its noun, for log lines and the output of commands."""

from __future__ import annotations


def counted(number: int, noun: str, nouns: str = "") -> str:
    """`1 entry`, `2 entries`. The plural `nouns` is the noun with an s by default."""
    return f"{number} {noun if number == 1 else nouns or f'{noun}s'}"
