"""The tasks of a campaign: many forks of one source as one job. In the order in which a campaign passes them:

    tasks     registers the tasks with Celery
    start     from a request to a plan and the first batches
    lanes     which batches are in the queue
    batch     makes some forks, then sends the next batch of its lane
    finish    ends the campaign once no further fork is to be made
    takeover  takes a campaign or a batch from a process that holds it and gives no heartbeat
    ending    what start and finish share: storing the campaign's result, and ending it without a plan
    ledger    the campaign's results in Redis

They work with `tasks.copier` and `tasks.store`.
"""
