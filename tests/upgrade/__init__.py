"""An upgrade: workers of the earlier and of this version on one queue and one filesystem.

A run of all tests includes a short one; `python -m tests.upgrade --seconds 600 --seed 7` runs longer.
"""
