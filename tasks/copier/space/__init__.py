"""What a fork may copy, what it will copy, and whether there is room for it.

forecast     the files that a planned fork will copy, as far as that is known before
budget       the bytes that a fork may still copy (`max_copied_bytes`), shared by the processes that make it
room         whether the destination's filesystem has free space for what will be copied
reservation  the bytes that other forks of this host will still copy
"""
