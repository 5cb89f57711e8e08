"""Cloning one entry: the data of a file and its metadata. Comparing a clone with its source.

    file                        files and symlinks: reflink, else sparse copy
    reflinker, sparse_copy      the two ways to clone the data of a file
    buffer, write_behind        the buffer of a copy; writing the copy to the disk while it is made
    zeros                       blocks of zeros in data that was read
    metadata, attributes, acl   owner, mode, times, extended attributes and ACLs
    name_collisions             names that the destination's filesystem does not distinguish
    compare, hardlinks          comparison of two directories

It may use `kernel` and `source`, but not staging, plans or chunks.
"""
