"""Whether entries came, went or were exchanged in the source while it was cloned."""

from __future__ import annotations

from collections.abc import Iterable

from tasks.copier import manifest
from tasks.copier.plan import Plan
from tasks.copier.selection import Selection
from tasks.copier.walk import Kind, Walk, join
from tasks.copier.work import Work, changed


def refuse_changed_directories(work: Work, plan: Plan, paths: Iterable[str]) -> None:
    """Raise ForkError source_changed when the entries of one of the directories `paths` are not those of the walk.

    A directory's times alone prove nothing: what is left out (a socket, a half-written compression) comes and goes
    in the directory of a running guest. So the touched ones are listed again, and compared by name and inode.
    """
    touched = set(paths)
    if not touched:
        return
    before: dict[str, set[tuple[str, int]]] = {path: set() for path in touched}
    for fd in (work.staging.manifest(), work.staging.manifest(closing=True)):
        with open(fd, "rb"):
            for block in manifest.read(fd, manifest.whole(fd)):
                if block.path in touched:
                    before[block.path] |= {(e.name, e.ino) for e in block.entries if e.kind != Kind.SKIP}
    selection = Selection(work.options.skip, work.options.exclude)
    walk = Walk(work.ends.source_fd, work.ends.source, selection, hardlinks=False, checkpoint=_go_on)
    for path in sorted(touched):
        now = {(e.name, e.ino) for block in walk.read(path) for e in block.entries if e.kind != Kind.SKIP}
        if now != before[path]:
            raise changed(join(work.ends.source, path))


def _go_on() -> None:
    """No look-up on the way: the lists are short."""
