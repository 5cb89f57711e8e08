"""The directory that is cloned: reading its entries, writing them into the manifest, leaving some out.

It uses `kernel` only. It reads, and changes nothing.
"""
