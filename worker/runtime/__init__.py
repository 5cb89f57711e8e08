"""The Celery process: its configuration, what it does beside its tasks, and which messages it accepts.

It uses `tasks` and the settings; it prints nothing.
"""
