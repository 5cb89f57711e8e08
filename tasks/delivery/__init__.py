"""Messages, how they end, and the Celery states of jobs.

    message         main process: a message that a child works on, and what happens if that child is lost
    queue_of_forks  the clients' queue, from which a child takes waiting messages itself
    task_request    what a running task reads from its message
    sending         sending tasks, and the context of a running task
    outcome         how a task ends: retry later, superseded, failed, or the job's final state
    canvas          the tasks that a client wants sent after its job
    signatures      which of a client's signatures a worker sends
    cancel          cancelling a job
    waiting         whether a message is still in a queue
    backend         Celery's result backend

It uses `tasks.store` and `tasks.contract`. It decides nothing about a fork.
"""
