"""One fork: planned, cloned in chunks, closed and published. Each step can be repeated by another process.

    lifecycle       the steps, from the request to the result
    attempt         one attempt in one process, and the ledger that keeps its results
    snapshot        cloning a whole btrfs subvolume in one step
    plan, survey    walking the source and cutting the work into chunks
    reflink_probe   whether the source can be reflinked to the destination
    chunk           cloning the files of one chunk
    close           closing the tree once all chunks are done
    completion      publishing a complete tree, or removing what was made
    source_changes  whether the source changed while it was cloned
    child_pool      children that share the chunks on this host
    early_chunks    a child that clones the first chunks while a worker plans
    local           a fork without a broker

It uses everything below it in `tasks.copier`, and nothing of campaigns.
"""
