"""The destinations of a campaign: a list of paths, or a template with a number in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf

from tasks.copier.errors import Code, ForkError
from tasks.copier.roots import normal_path

#: The most forks of one campaign. Redis keeps about 1.5 KB of each.
MOST_FORKS = 1_000_000
#: What may follow the colon in `{n:04}`: a width, with or without leading zeros.
_WIDTH = re.compile(r"(0?[1-9][0-9]?)?d?")


def _template(template: str) -> str:
    """Refuse any field but `{n}` and `{n:04}`: other format strings can read attributes of objects."""
    try:
        fields = [(name, width, conversion) for _, name, width, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"the template is not valid: {error}") from None
    for name, width, conversion in fields:
        if name is not None and (name != "n" or conversion or not _WIDTH.fullmatch(width or "")):
            raise ValueError("use only {n} or {n:04} (a width of at most 99) in a template")
    return template


class Template(BaseModel):
    """`count` paths: `template` with `{n}` as `start`, `start + 1` and so on."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    template: Annotated[InstanceOf[str], AfterValidator(_template)]
    count: Annotated[int, Field(ge=1, le=MOST_FORKS)]
    start: Annotated[int, Field(ge=0, le=2**53)] = 1

    def paths(self) -> Iterator[str]:
        """The paths, in order."""
        for n in range(self.start, self.start + self.count):
            yield self.template.format(n=n)


def normal_paths(paths: Iterable[str]) -> list[str]:
    """The destinations, normalized, in order.

    Raises ForkError invalid_request for an invalid path, for a path that is given twice, and for a path inside another
    destination: no fork may be made inside the tree of another one.
    """
    normal = [normal_path(path, "destinations") for path in paths]
    known = set(normal)
    if len(known) < len(normal):
        twice = next(path for path, times in Counter(normal).items() if times > 1)
        raise ForkError(
            Code.INVALID_REQUEST, "destinations: the path is given twice; remove one, or use {n} in the template", twice
        )
    parents: set[str] = set()  # most destinations have the same parent
    for path in normal:
        parent = path.rpartition("/")[0]
        while parent and parent not in parents:
            if parent in known:
                raise ForkError(
                    Code.INVALID_REQUEST, f"destinations: the path is inside another destination, {parent}", path
                )
            parents.add(parent)
            parent = parent.rpartition("/")[0]
    if "/" in known and len(normal) > 1:
        raise ForkError(Code.INVALID_REQUEST, "destinations: the other destinations are inside it", "/")
    return normal
