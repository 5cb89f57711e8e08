"""The directory that is cloned. It is only read.

    walk         reading its entries
    selection    which entries are left out
    manifest     the list of entries on disk
    read_leases  whether a file is open for writing while it is cloned

It may use `kernel`, and `errors`, `validation` and the other modules that every layer uses.
"""
