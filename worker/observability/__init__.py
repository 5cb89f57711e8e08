"""What a worker shows to those who operate it: metrics and health over HTTP.

    reports         what pool processes report to the main process, through a pipe
    metrics         the counters, from reports
    gauges          the values that are read when they are needed: queues, roots, children
    readings        threads that read slow things at an interval
    consumer        whether the consumer loop turns, and what the pool does
    health          alive, ready
    http_server     the listener
    service         puts them together

Nothing here waits for Redis, a filesystem or a pool process when a request is answered.
"""
