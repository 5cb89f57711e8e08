"""What `forkvm doctor` and a starting worker check: the host, its roots, Redis, and filesystems that hosts share.

Each check yields a `Check`: what was looked at, what was found, and how to fix it.
"""
