"""What `forkvm doctor` and a starting worker check: the host, its roots, Redis, and filesystems that hosts share.

    check                the result of a check
    settings             the settings and the environment
    io_scheduler         whether the disks' schedulers know the I/O priority
    host                 kernel, limits, and each root
    filesystem           mounts and XFS
    copy_on_write        kernels with known faults in the isolation of reflinks
    process              user and capabilities
    reflink_pairs        reflinks from each root to each other
    shared_filesystems   filesystems that hosts share
    redis, redis_rights  Redis; the rights of its user
    startup              what a worker checks when it starts

Each check yields a `Check`: what was looked at, what was found, and how to fix it.
"""
