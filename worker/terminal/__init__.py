"""The terminal side of a command: what it prints, its standard streams, and the signals that end it.

It uses `tasks` and the exit codes.
"""
