"""Messages and their states: callbacks, cancellation, lost processes, and Celery's result backend.

It uses `tasks.store` and `tasks.contract`. It decides nothing about a fork.
"""
