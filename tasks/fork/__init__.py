"""The tasks of one fork: start, chunk, finish, abandon, and the takeover from a holder that is paused.

`tasks` registers them with Celery; the other modules do the work with `tasks.copier` and `tasks.store`.
"""
