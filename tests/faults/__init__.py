"""Faults of every kind at many moments: no fork is lost, torn, made twice or left behind."""
