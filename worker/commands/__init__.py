"""The commands of `forkvm`: one module for each group of commands, and what they share.

    fork, campaign, queue, gc, worker, doctor, demo      the commands
    options, output, waiting                             what they take, print and wait for
    signals, streams, unexpected_errors                  how they end

A command's module is imported when the command is called: `forkvm fork` starts without Celery.
"""
