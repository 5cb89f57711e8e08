"""The staging of a fork: two directories beside its destination, in which it is built until a rename publishes it.

    staging             both directories, and the fence that protects them
    control_directory   making, finding and locking the control directory, and its files
    files, proof        which names and which owners its files may have
    journal, parts      how far a fork is, and what each of its chunks did
    heartbeat           signs of life of the processes that hold a staging
    takeover            taking a fork from a process that gives no sign of life
    publishing          whether the filesystem can publish a fork
    workspace           one attempt at a fork: open source, open tree, options
    gc                  removing the staging of dead processes
    shared_filesystems  whether other hosts see the locks of this one
    self_test           trying out what a filesystem can do

It uses `kernel`, `source` and `clone`. All that is read from disk is treated as untrusted input (see `proof`).
"""
