"""The process: the command line, the settings, and Celery's app and worker.

    cli         the command `forkvm`
    app         the Celery app of a worker
    commands    one module for each group of commands
    checks      what `forkvm doctor` and a starting worker check
    runtime     the Celery process beside its tasks
    client      the command line's side of the queue
    settings    FORKVM_* and what they mean; redis_url, tls, environment, cpus and own_packages serve it
    terminal    what a command prints

It uses `tasks`, and nothing uses it.
"""

import os

from worker.own_packages import prefer_own_packages

# pydantic would read the metadata of every installed package, to find plugins that are none of ours: 20 ms a command.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

prefer_own_packages()  # before anything imports `tasks`
