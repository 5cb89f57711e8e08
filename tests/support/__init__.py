"""What the tests of several layers share.

`tree`, `extents`, `guests` and `sources` make and compare directories without the program's own code, so that they can
judge that code. `requirements` and `outcome` belong to pytest. `engine` forks without Celery and Redis; `system` runs
workers and sends them requests. Fixtures are in tests/fixtures.
"""
