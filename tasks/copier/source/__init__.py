"""The directory that is cloned. It is only read.

    walk         reading its entries
    selection    which entries are left out
    manifest     the list of entries on disk

It may use `kernel`, `errors` and `validation`.
"""
