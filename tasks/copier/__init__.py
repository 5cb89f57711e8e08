"""The engine: it clones a directory on one host. It needs neither Celery nor Redis.

    kernel     system calls, and what each refusal means
    source     the directory that is cloned: its entries, and which of them are left out
    clone      one file or directory: data, metadata, and the comparison of a clone with its source
    space      what a fork may copy, and what it will copy
    staging    the directory in which a fork is built: its lock, its journal, its removal
    fork       one fork, from the plan to the rename that publishes it
    campaign   many forks of one source, in batches
    estimate   what a fork would do and cost, found out without making it

    errors, validation, options, progress, counted   used by every layer
    copy_rate                                        the bound on the bytes that a host copies in a second
    roots, endpoints                                 opening the source and the destination
    report, metadata_losses, fork_spec               requests and results as the engine sees them
    child_processes                                  the supervisor of child processes
    io_priority                                      the I/O priority of processes that clone

Imports point down: kernel, then source, clone, staging, space, fork and campaign.
"""
