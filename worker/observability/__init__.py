"""What a worker shows to those who operate it: metrics and health over HTTP.

    service         puts the parts together
    reports         what pool processes report to the main process, through a pipe
    fallbacks       the log line for refused reflinks
    metrics         the counters, from reports
    gauges          the values that are read when they are needed: queues, roots, children
    readings        threads that read slow things at an interval
    consumer        whether the consumer loop turns, and what the pool does
    health          alive, ready
    endpoint        metrics and health together
    http_server     the listener
    tracing         spans of forks and campaigns, from reports
    logs            the log: text or JSON, one line for each record

Nothing here waits for Redis, a filesystem or a pool process when a request is answered.
"""
