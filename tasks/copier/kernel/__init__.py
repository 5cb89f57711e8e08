"""System calls, and the meaning of what they return. It decides nothing, and imports nothing else of the program.

syscalls     the calls that Python does not offer
reflink      FICLONE: which errnos concern a file, a pair of filesystems, or are errors
sparse       data extents and holes (SEEK_DATA, SEEK_HOLE)
extents      blocks that two files share on disk (FIEMAP)
contents     comparing the bytes of two files
trees        opening, identifying and removing directories below an open one
mounts       shared filesystems, lock options, mount points
filesystems  the names of filesystems
free_space   the free space of a filesystem
xfs          what an XFS filesystem says of itself
leases       read leases: whether a file is open for writing
page_cache   the pages of files in memory
processes    state, signals, open files and I/O priority of processes
"""
