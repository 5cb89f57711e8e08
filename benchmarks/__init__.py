"""How fast forkvm is, compared with other programs that copy trees and with the limit that the kernel sets.

    python -m benchmarks --help

cases           what is forked: generated directory trees
contenders/     what is measured: forkvm, the other programs, and bare loops as the limit
filesystems     where: filesystems on loop devices, or a given directory
rounds          runs the contenders in turn and checks their copies (copy_check)
measures/       figures beside the table: campaigns, memory, messages, ...
report/         the table, the picture, the targets, and the file that keeps figures
plan            what one run of `python -m benchmarks` measures, and where

Nothing imports this package except its tests. It runs forkvm with default settings, except in the measure of metrics.
"""
