"""Forks and campaigns that a test makes in its own process or in a child, without Celery and Redis."""
