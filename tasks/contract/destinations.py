"""Where the forks of a campaign go: a list of paths, or a template that is counted through."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf

from tasks.copier.errors import Code, ForkError
from tasks.copier.roots import normal_path

#: Most forks of one campaign: what Redis keeps of each is about 1.5 KB.
MOST_FORKS = 1_000_000
#: What may follow the colon in `{n:04}`: a width, with or without leading zeros.
_WIDTH = re.compile(r"(0?[1-9][0-9]?)?d?")


def _counted(template: str) -> str:
    """A template holds `{n}` or `{n:04}`, and no other field: a format string could reach into objects."""
    try:
        fields = [(name, width, conversion) for _, name, width, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"no template: {error}") from None
    for name, width, conversion in fields:
        if name is not None and (name != "n" or conversion or not _WIDTH.fullmatch(width or "")):
            raise ValueError("a template takes {n} and {n:04} (a width of at most 99), and no other field")
    return template


class Template(BaseModel):
    """`count` paths: `template` with `{n}` as `start`, `start + 1` and so on."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    template: Annotated[InstanceOf[str], AfterValidator(_counted)]
    count: Annotated[int, Field(ge=1, le=MOST_FORKS)]
    start: Annotated[int, Field(ge=0, le=2**53)] = 1

    def paths(self) -> Iterator[str]:
        """The paths, in order."""
        for n in range(self.start, self.start + self.count):
            yield self.template.format(n=n)


def normal_paths(paths: Iterable[str]) -> list[str]:
    """The destinations as the engine takes them, in order.

    Raises ForkError invalid_request for a path that is none, that stands there twice, or that lies inside another:
    forks are never merged, and none may be made within another one's tree.
    """
    normal = [normal_path(path, "destinations") for path in paths]
    known = set(normal)
    if len(known) < len(normal):
        twice = next(path for path, times in Counter(normal).items() if times > 1)
        raise ForkError(Code.INVALID_REQUEST, "destinations: the same path twice", twice)
    parents: set[str] = set()  # most share theirs
    for path in normal:
        parent = path.rpartition("/")[0]
        while parent and parent not in parents:
            if parent in known:
                raise ForkError(Code.INVALID_REQUEST, f"destinations: it lies inside another one, {parent}", path)
            parents.add(parent)
            parent = parent.rpartition("/")[0]
    if "/" in known and len(normal) > 1:
        raise ForkError(Code.INVALID_REQUEST, "destinations: the others lie inside it", "/")
    return normal
