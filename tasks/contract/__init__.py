"""The contract with schedulers: requests, and the exception that a failed job raises in its client.

    fork_request      ForkRequest
    campaign_request  CampaignRequest
    destinations      the destinations of a campaign, as a list or a template

It uses `tasks.copier` only. Celery stores the path of an exception's class in the result, and clients depend on that of
ForkFailed. It is therefore defined here.
"""


class ForkFailed(Exception):
    """A fork or campaign failed. `AsyncResult.get()` raises it in the client: `code: path: what happened`."""
