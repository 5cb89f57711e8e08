"""The command line and the worker process.

    cli                the entry point of the command `forkvm`
    app                the Celery app of a worker, and what it checks at its start
    commands           the commands, one module for each group
    client             the commands' connection to the queue and the results
    overview           what a domain does at this moment: queues, jobs, workers
    terminal           output, standard streams and signals of a command
    exit_codes         the exit codes of all commands
    checks             the checks of `forkvm doctor` and of a starting worker
    runtime            the Celery side of a worker: configuration, bootsteps, patches, message filter
    observability      what a worker shows of itself: metrics, probes, its log, traces
    settings           the settings FORKVM_*
    secret_files       settings in files
    redis_url, tls     the URLs of Redis, and TLS
    environment        environment variables of other programs
    cpus               the number of CPUs that a worker may use
    started_processes  what the demo needs to start a Redis and a worker
    own_packages       the import path

It uses `tasks`. `tasks` does not use it.
"""

import os

from worker.own_packages import prefer_own_packages

# Otherwise pydantic searches the metadata of all installed packages for plugins, which takes 20 ms.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

prefer_own_packages()  # before anything imports `tasks`
