"""A running system (Redis, workers, a client) and properties of its results."""
