"""A directory with a user's own modules. Some have the names of modules of this program or its libraries."""

from __future__ import annotations

from pathlib import Path


def make_foreign_modules(directory: Path, *, with_worker: bool) -> Path:
    """Make `directory` with the tasks.py of Celery's tutorial and modules that end the program that imports them."""
    directory.mkdir()
    (directory / "tasks.py").write_text("from celery import Celery\napp = Celery('tutorial')\n")
    for name in ("redis", "click", "kombu", "pydantic", "rich"):
        (directory / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')\n")
    if with_worker:
        (directory / "worker").mkdir()
        (directory / "worker" / "__init__.py").write_text("raise SystemExit('the user\\'s worker was imported')\n")
    return directory
