"""The process: the command line, the settings, and Celery's app and worker."""

from worker.own_packages import prefer_own_packages

prefer_own_packages()  # before anything imports `tasks`
