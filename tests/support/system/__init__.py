"""A running system (Redis, workers, a client) and what must hold for its results."""
