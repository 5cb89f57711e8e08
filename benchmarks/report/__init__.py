"""Figures as tables, as a picture and as JSON, with their targets."""
