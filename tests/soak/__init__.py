"""Forks, workers and faults, chosen at random from a seed, for a given time; then the checks.

`python -m tests.soak --seconds 300 --seed 7`
"""
