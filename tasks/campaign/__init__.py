"""The tasks of a campaign: start, batch, finish. Many forks of one source are one job.

`tasks` registers them with Celery; the other modules do the work with `tasks.copier` and `tasks.store`.
"""
