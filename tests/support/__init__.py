"""Code that the tests of several layers share.

`tree`, `extents`, `guests` and `sources` create and compare directories without the program's own code, so that they
can verify that code. `requirements` and `outcome` extend pytest. `engine` makes forks without Celery and Redis;
`system` runs workers and sends them requests. Fixtures are in tests/fixtures.
"""
