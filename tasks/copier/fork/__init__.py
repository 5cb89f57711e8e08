"""One fork: planned, cloned in chunks, closed and published; each step can be repeated by another process.

It uses everything below it in `tasks.copier`, and nothing of campaigns.
"""
