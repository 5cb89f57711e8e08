"""How a ForkRequest becomes a ForkSpec. Its fields are defined in `request_model`.

The results are defined in `tasks.copier.fork_spec` and `tasks.copier.report`.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Literal, TypeGuard

from tasks.contract.raw_request import text_of
from tasks.copier.errors import ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.report import Totals
from tasks.copier.roots import normal_path

_PATHS = ("source", "destination")


def spec_of(request: object, fork_id: str, *, owner: Literal["queue", "local"], queued: float = 0.0) -> ForkSpec:
    """The fork that a request asks for. `queued` is how long it waited, in seconds.

    Raises ForkError invalid_request, which names the field.
    """
    spec = partial(ForkSpec, fork_id=fork_id, owner=owner, queued=queued, started=time.time())
    if _is_two_paths(request):
        source, destination = (normal_path(request[name], name) for name in _PATHS)
        return spec(source=source, destination=destination)
    # pydantic takes half as long to import as `forkvm fork` runs, so a request in which the model would check nothing
    # but the two paths does without it.
    from tasks.contract.request_model import ForkRequest, parse_as

    parsed = parse_as(ForkRequest, request)
    return spec(source=parsed.source, destination=parsed.destination, options=parsed.options(), labels=parsed.labels)


def _is_two_paths(request: object) -> TypeGuard[dict[str, str]]:
    """Whether the request has only a source and a destination, each a string."""
    return isinstance(request, dict) and request.keys() == set(_PATHS) and all(type(request[n]) is str for n in _PATHS)


def refused(request: object, fork_id: str, error: ForkError) -> ForkResult:
    """The result of a request that is not a valid ForkRequest."""
    spec = ForkSpec(fork_id=fork_id, source=text_of(request, "source"), destination=text_of(request, "destination"))
    return failed(spec, error, Totals(), 0, Clock(spec.started))
