"""Many forks of one source, made in batches: each file is opened once, and each fork is published by its own rename.

    spec          the request, the progress and the result
    plan          the walk of the source, the size of a batch, the list of destinations
    batch         making one batch
    batch_trees   the trees of a batch
    batch_room    whether there is room for those that are copied
    batch_build   filling them with clones
    batch_record  what a try at a batch wrote down for the next one
    finish        ending the forks that were not made, and removing the control directories
    local         a campaign without a broker

It uses everything below it in `tasks.copier`.
"""
