"""Which entries of a guest directory stay out of a fork, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

#: Names that staging uses (see `staging`). They are never guest data: a fork into a directory of the source
#: that runs at the same time must not end up in this one.
STAGING_NAME = re.compile(r"\.forkvm-[0-9a-f]{16}(\.[0-9a-f]{8})?")
#: Files by which workers on several hosts try each other's locks (see `fence`).
MARKER_NAME = re.compile(r"\.forkvm-worker-[0-9a-f]{16}")


class Selection:
    """The rule for one fork, made from `skip` (relative paths) and `exclude` (patterns).

    A pattern with a slash at its start or within is matched against the whole relative path, others against the
    name at any depth; a slash at the end keeps it to directories. `*` and `?` do not match a slash, as in a shell.
    """

    def __init__(self, skip: Iterable[str], exclude: Iterable[str]) -> None:
        self._skip = frozenset(path.strip("/") for path in skip)
        names: list[str] = [MARKER_NAME.pattern + r"\Z"]
        self._paths: list[tuple[re.Pattern[str], bool, str]] = []
        self._names: list[tuple[re.Pattern[str], bool, str]] = []
        #: Whether the path of a file has to be looked at, beside its name.
        self._looks_at_file_paths = bool(self._skip)
        for pattern in exclude:
            only_directories = pattern.endswith("/")
            body = pattern.rstrip("/")
            rule = (_compile(body.lstrip("/")), only_directories, pattern)
            if "/" in body:
                self._paths.append(rule)
                self._looks_at_file_paths |= not only_directories
            else:
                self._names.append(rule)
                names.append(rule[0].pattern)
        # One match decides nearly every name; only a name that some pattern takes pays for finding which.
        self._any_name = re.compile("|".join(names))

    def reason(self, directory: str, name: str, is_directory: bool) -> str | None:
        """Why the entry `name` of `directory` (relative, "" for the top) is left out, or None to take it."""
        if self._any_name.match(name):
            if MARKER_NAME.fullmatch(name):
                return "marker of a worker"
            for rule, only_directories, pattern in self._names:
                if rule.match(name) and (is_directory or not only_directories):
                    return f"excluded by {pattern}"
        if is_directory or self._looks_at_file_paths:
            path = f"{directory}/{name}" if directory else name
            if path in self._skip:
                return "skip"
            for rule, only_directories, pattern in self._paths:
                if rule.match(path) and (is_directory or not only_directories):
                    return f"excluded by {pattern}"
        if is_directory and STAGING_NAME.fullmatch(name):
            return "staging of another fork"
        return None


#: The parts of a shell pattern: stars, a question mark, a set such as [a-z] or [!0-9], or any other character.
_PART = re.compile(r"\*+|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)


@lru_cache
def _compile(pattern: str) -> re.Pattern[str]:
    """A shell pattern as a regular expression over a whole name or path; no wildcard crosses a slash.

    `fnmatch.translate` would let `*` match a slash, so that `/a/*.raw` took files at any depth below `a`. As there,
    what stands between two stars is matched at its first place and not tried again (an atomic group): a pattern of
    many stars costs no more than one pass.
    """
    fixed: list[str] = [""]
    for part in _PART.findall(pattern):
        if part.startswith("*"):
            fixed.append("")
        else:
            fixed[-1] += _translate(part)
    first, *rest = fixed
    if not rest:
        return re.compile(first + r"\Z", re.DOTALL)
    middle = "".join(f"(?>[^/]*?{text})" for text in rest[:-1])
    return re.compile(f"{first}{middle}[^/]*{rest[-1]}\\Z", re.DOTALL)


def _translate(part: str) -> str:
    if part == "?":
        return "[^/]"
    if len(part) > 1:
        negated, members = part[1] == "!", part[1:-1].removeprefix("!")
        for special in ("\\", "[", "]", "^", "&", "~", "|"):
            members = members.replace(special, "\\" + special)
        return f"[{'^/' if negated else ''}{members}]"
    return re.escape(part)
