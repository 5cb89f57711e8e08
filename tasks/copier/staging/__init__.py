"""The staging of a fork: two directories beside its destination, in which it is built until a rename publishes it.

It uses `kernel`, `source` and `clone`. Everything here treats what it finds on disk as hostile (see `proof`).
"""
