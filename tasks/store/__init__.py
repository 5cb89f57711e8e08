"""What Redis holds of a job: its claim, its result, its FileResults, its progress; each key with a TTL.

It uses `tasks.contract`, `tasks.names` and `tasks.copier`. `ended*` is a note on this host's disk that covers for a
Redis which lost its last second.
"""
