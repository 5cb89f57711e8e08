"""The tasks of one fork. In the order in which a fork passes them:

    tasks          registers the tasks with Celery
    start          from a request to a result, or to chunks
    waiting_forks  small forks that wait, made by the process that has just made one
    chunk          one part of a large fork
    finish         publishes a fork whose chunks are done, or removes one that failed or was cancelled
    estimate       what a fork would do and cost
    abandon        ends a fork whose messages kill the processes that work on it
    takeover       takes a fork from a process that holds it and gives no heartbeat
    ending         what all of these share: storing a result, removing the staging
    foreign_ids    drops a request whose id belongs to another job

They work with `tasks.copier` and `tasks.store`.
"""
