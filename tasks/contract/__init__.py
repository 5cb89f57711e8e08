"""The contract with schedulers: requests, and the exception that a failed job raises in its client.

    fork_request      how a ForkRequest becomes a ForkSpec
    campaign_request  the fields of a CampaignRequest, and how it becomes a CampaignSpec
    request_model     the fields of a ForkRequest and those of both
    schemas           the JSON Schemas of requests, results and progress
    remedies          what to do for each error code
    raw_request       what is read of a request that has not been checked
    destinations      the destinations of a campaign, as a list or a template

It uses `tasks.copier` only. Celery stores the path of an exception's class in the result, and clients depend on that of
ForkFailed. It is therefore defined here.
"""


class ForkFailed(Exception):
    """A fork or campaign failed. `AsyncResult.get()` raises it in the client: `code: path: what happened`."""
