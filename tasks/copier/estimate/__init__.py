"""What a fork would do and cost, found out without making it. In the order in which it is done:

    estimate  plans the fork in a staging directory, which is removed again: the Estimate of the contract
    counts    looks into the files: what will be copied, how many extents they have
    samples   the pace of this machine, from a few files
    duration  how long the fork will take
    surprises the warnings

It uses the plan, the reflink probe and the snapshot of `tasks.copier.fork`, and gets the same answers from the kernel.
"""
