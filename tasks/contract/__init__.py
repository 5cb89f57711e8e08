"""The contract with schedulers: what a request may say, and the exception that a failed fork raises in its client.

It uses `tasks.copier` only. Clients find ForkFailed by the name of this package, so it is defined here.
"""


class ForkFailed(Exception):
    """A fork that failed, as the client's `AsyncResult.get()` raises it: `code: path: what happened`."""
