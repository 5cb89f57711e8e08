"""Faults of every kind, each at many moments: nothing is lost, torn, doubled or left."""
