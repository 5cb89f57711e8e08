"""Many forks of one source, made in batches: each file opened once, each fork published by a rename of its own."""
