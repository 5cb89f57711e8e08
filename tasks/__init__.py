"""What the queue does: tasks, the contract with schedulers, and what Redis holds.

    names           the names of tasks and queues
    contract        what a request may say
    store           what Redis holds of a job
    delivery        messages: their callbacks, their loss, their cancellation
    context         what a running task is given
    events          what happens to jobs, for the observer that a worker installs
    fork_summary    a fork that has ended, in brief: for the log and the observer
    fork_ledger     where the end of a fork is kept
    complete_forks  small forks that are ended together
    fork            the tasks of one fork
    campaign        the tasks of a campaign
    cleanup         what a dead process left of a job that has ended
    sweep           the task that finds jobs which nobody works on

Imports point down: fork and campaign use delivery and store, and these use `tasks.copier`. Nothing here imports worker.
"""
