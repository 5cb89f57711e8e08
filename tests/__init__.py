"""The tests of forkvm."""
