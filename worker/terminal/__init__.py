"""The terminal side of a command: what it prints, its standard streams, and the signals that end it.

    printing  results on stdout, messages on stderr, no control characters
    streams   the standard streams: always open, always UTF-8
    signals   how a command ends on a signal

It uses `tasks` and the exit codes.
"""
