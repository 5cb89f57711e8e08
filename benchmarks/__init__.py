"""How fast a fork is, beside the programs that people copy trees with, and beside what the kernel allows.

    python -m benchmarks --help

Nothing imports this package. It runs forkvm with the defaults that a user gets.
"""
