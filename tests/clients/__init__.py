"""`make test-clients`: clients with each version of Celery since 5.2, with a real Redis and a real worker.

The files are not named as tests, so that `make test` leaves them out: they install each version.
"""
