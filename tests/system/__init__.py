"""The whole system: a real Redis, a real worker with two children, and a client that has only Celery."""
