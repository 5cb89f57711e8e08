"""The commands that show a domain at work: `forkvm queues` once, `forkvm top` again and again.

queues  the commands
tables  an overview as tables
"""
