"""System calls, and the meaning of what they return. It decides nothing, and imports nothing else of the program.

syscalls     the calls that Python does not offer
reflink      FICLONE: which errnos concern a file, a pair of filesystems, or are errors
sparse       data extents and holes (SEEK_DATA, SEEK_HOLE)
extents      blocks that two files share on disk (FIEMAP)
contents     comparing the bytes of two files
trees        opening, identifying and removing directories below an open one
mounts       shared filesystems, lock options, mount points
processes    state, signals and open files of processes
"""
