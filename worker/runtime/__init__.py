"""The Celery side of a worker.

    configuration      the Celery app and its options, for commands too
    worker_app         the Celery app of a worker: the tasks, and what runs beside them
    timeouts           timeouts of connections to Redis
    bootsteps          what a worker does next to its tasks: leases, heartbeat, sweeps
    periodic_step      the base of those that happen at an interval
    own_record         what a worker writes about itself, for the time when it does not answer
    earlier_versions   redelivery of messages that workers of earlier versions took
    message_filter     the validation of messages before Celery sees them
    refused_messages   the result that the client of a refused message gets
    compression        compressed message bodies
    remote_control     Celery's remote-control commands, and the validation of their messages
    node_name          the worker's name among Celery's nodes
    patches            patches of kombu and Celery

It uses `tasks` and the settings. It prints nothing; it logs.
"""
