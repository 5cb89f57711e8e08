"""The process: the command line, the settings, and Celery's app and worker."""

import os

from worker.own_packages import prefer_own_packages

# pydantic would read the metadata of every installed package, to find plugins that are none of ours: 20 ms a command.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

prefer_own_packages()  # before anything imports `tasks`
