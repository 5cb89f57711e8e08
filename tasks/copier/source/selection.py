"""Which entries of a guest directory are left out of a fork, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

#: Names that `tasks.copier.staging` uses. They are never cloned, whatever their type: another fork may be building in a
#: directory of the source at the same time, and `gc` would report what looks like staging in each fork.
STAGING_NAME = re.compile(r"\.forkvm-[0-9a-f]{16}(\.[0-9a-f]{8})?")
#: Files with which workers on several hosts check each other's locks (`staging.shared_filesystems`).
MARKER_NAME = re.compile(r"\.forkvm-worker-[0-9a-f]{16}")


class Selection:
    """The rules of one fork, from `skip` (relative paths) and `exclude` (patterns).

    A pattern with a slash at its start or within is matched against the whole relative path, others against the name at
    any depth. A slash at the end limits a pattern to directories. As in a shell, `*` and `?` do not match a slash.
    """

    def __init__(self, skip: Iterable[str], exclude: Iterable[str]) -> None:
        self._skip = frozenset(path.strip("/") for path in skip)
        names: list[str] = [rf"{kind.pattern}\Z" for kind in (MARKER_NAME, STAGING_NAME)]
        self._paths: list[tuple[re.Pattern[str], bool, str]] = []
        self._names: list[tuple[re.Pattern[str], bool, str]] = []
        #: Whether the path of a file must be compared too, not only its name.
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
        # One match is enough for nearly every name. Which pattern matches is only searched for if one does.
        self._any_name = re.compile("|".join(names))

    def reason(self, directory: str, name: str, is_directory: bool) -> str | None:
        """Why the entry `name` of `directory` (relative, "" for the top) is left out, or None if it is cloned."""
        if self._any_name.match(name):
            if MARKER_NAME.fullmatch(name):
                return "marker of a worker"
            if STAGING_NAME.fullmatch(name):
                return "staging of another fork" if is_directory else "a name of staging"
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
        return None


#: The parts of a shell pattern: stars, a question mark, a set such as [a-z] or [!0-9], or any other character.
_PART = re.compile(r"\*+|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)


@lru_cache(maxsize=1)
def selection_of(skip: tuple[str, ...], exclude: tuple[str, ...]) -> Selection:
    """The Selection of these rules; that of the last fork is kept, because the next one often has the same."""
    return Selection(skip, exclude)


@lru_cache
def _compile(pattern: str) -> re.Pattern[str]:
    """A shell pattern as a regular expression for a whole name or path, in which no wildcard matches a slash.

    With `fnmatch.translate`, `*` would match a slash, and `/a/*.raw` would match at any depth below `a`. As there, the
    text between two stars is matched at its first occurrence only (an atomic group), so that a pattern with many stars
    needs one pass.
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
