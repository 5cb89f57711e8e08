"""Cloning one entry: the data of a file, its metadata, its names; and comparing a clone with its source.

It uses `kernel` and `source`. It knows nothing of staging, plans or chunks.
"""
