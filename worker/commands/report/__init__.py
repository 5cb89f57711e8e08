"""The command `forkvm report`: one HTML page about a fork or campaign that has ended.

command    the command
contents   what the page says, gathered from the results
durations  durations in bins of a logarithmic scale
page       the page as HTML
"""
