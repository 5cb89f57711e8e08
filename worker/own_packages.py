"""Sees to it that `import tasks` gives this program's package: Celery's own tutorial calls its module tasks.py too."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from worker.exit_codes import BAD_CALL

#: The directory that holds the packages `worker` and `tasks`.
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def prefer_own_packages() -> None:
    """Have nothing imported from the working directory that is elsewhere too; end where `tasks` is another's still.

    `python -m` and `celery -A` put the working directory first on the path, and so does an empty entry of PYTHONPATH.
    """
    _put_working_directory_last()
    place = _place_of_tasks()
    if place is not None and os.path.dirname(place) != os.path.join(_HOME, "tasks"):
        found = f"{ascii(place)[1:-1]} is imported in place of the package tasks in {_HOME}"
        remedy = "take its directory out of PYTHONPATH, or install forkvm in an environment of its own"
        print(f"forkvm: {found}: {remedy}", file=sys.stderr)
        sys.exit(BAD_CALL)


def _put_working_directory_last() -> None:
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return
    if here != _HOME:
        sys.path.sort(key=lambda entry: entry in ("", here))  # stable: the others keep their order


def _place_of_tasks() -> str | None:
    """The file that `import tasks` gives."""
    loaded = sys.modules.get("tasks")
    if loaded is not None:
        return getattr(loaded, "__file__", None)
    found = find_spec("tasks")
    return None if found is None else found.origin
