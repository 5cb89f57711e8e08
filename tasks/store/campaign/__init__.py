"""What Redis holds of campaigns beside what it holds of every job: sums, failures, batches, the results of forks.

results   what Redis holds of one campaign
outcomes  storing the results of a run of its forks, in one command and once
fork_ids  the ids of its forks: whether they are free, and when their keys expire
"""
