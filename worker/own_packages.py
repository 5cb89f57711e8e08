"""The import path: `import tasks` must give this program's package, not a tasks.py as in Celery's tutorial."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from worker.exit_codes import BAD_CALL

#: The directory of the packages `worker` and `tasks`.
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def prefer_own_packages() -> None:
    """Move the working directory to the end of the import path. Exit if `tasks` is still another package.

    `python -m`, `celery -A` and an empty entry of PYTHONPATH put the working directory first.
    """
    _put_working_directory_last()
    place = _place_of_tasks()
    if place is not None and os.path.dirname(place) != os.path.join(_HOME, "tasks"):
        found = f"{ascii(place)[1:-1]} would be imported instead of the package tasks in {_HOME}"
        remedy = "remove its directory from PYTHONPATH, or install forkvm in its own virtual environment"
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
    """The file that `import tasks` loads or has loaded."""
    loaded = sys.modules.get("tasks")
    if loaded is not None:
        return getattr(loaded, "__file__", None)
    found = find_spec("tasks")
    return None if found is None else found.origin
