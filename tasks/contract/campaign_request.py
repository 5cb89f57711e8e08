"""The contract with schedulers: the fields of a CampaignRequest, and how it becomes a CampaignSpec."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Discriminator, Field, InstanceOf, Tag

from tasks.contract.destinations import MOST_FORKS, Template, normal_paths
from tasks.contract.raw_request import text_of
from tasks.contract.request_model import AnyRequest, parse_as
from tasks.copier.campaign.spec import Aims, CampaignResult, CampaignSpec, campaign_result
from tasks.copier.errors import ForkError
from tasks.copier.options import OnError

#: The number of the first fork of a list of destinations; also the default of a template.
_FIRST = 1
#: A request of at most so many characters is kept whole, so that it can be sent again if its message was lost.
_KEPT_WHOLE = 64 << 10
#: Longest deadline, in seconds: ten years.
_LONGEST = 315_360_000


class CampaignRequest(AnyRequest):
    """A request for many forks of one source, as decoded from JSON."""

    destinations: Annotated[
        Annotated[list[InstanceOf[str]], Field(min_length=1, max_length=MOST_FORKS), Tag("list")]
        | Annotated[Template, Tag("template")],
        Discriminator(lambda value: "template" if isinstance(value, dict) else "list"),
    ]
    #: The most forks that are made at the same time, so that a campaign leaves room for others. None: no limit.
    max_parallel: Annotated[int, Field(ge=1)] | None = None
    on_error: OnError = "continue"
    #: Seconds from the campaign's start. Forks that are not published by then are cancelled. None: no deadline.
    deadline: Annotated[float, Field(gt=0, le=_LONGEST)] | None = None


def campaign_of(
    request: object,
    campaign_id: str,
    *,
    owner: Literal["queue", "local"],
    queued: float = 0.0,
    clock: Callable[[], float] = time.time,
) -> tuple[CampaignSpec, list[str]]:
    """The campaign that a request asks for, and its forks' destinations, in order.

    `queued` is how long the request waited, in seconds. `clock` is the clock of `Aims.deadline`. Raises ForkError
    invalid_request, which names the field.
    """
    started = time.time()
    parsed = parse_as(CampaignRequest, request)
    given = parsed.destinations
    paths = normal_paths(given.paths() if isinstance(given, Template) else given)
    aims = Aims(
        count=len(paths),
        start=given.start if isinstance(given, Template) else _FIRST,
        max_parallel=parsed.max_parallel,
        on_error=parsed.on_error,
        deadline=None if parsed.deadline is None else clock() + parsed.deadline,
    )
    spec = CampaignSpec(
        campaign_id=campaign_id,
        source=parsed.source,
        options=parsed.options(),
        labels=parsed.labels,
        owner=owner,
        queued=queued,
        started=started,
        aims=aims,
    )
    return spec, paths


class Summary(TypedDict):
    """What is kept of a request in Redis: a digest of it, and its fields except a long list of destinations."""

    kept: dict[str, Any]
    forks: int
    start: int
    sha256: str


def summary_of(request: object, spec: CampaignSpec) -> Summary:
    """The summary of a request. `spec` has no forks if the request is invalid."""
    text = json.dumps(request, sort_keys=True, default=str)
    asked = request if isinstance(request, dict) and spec.aims.count else {}
    whole = len(text) <= _KEPT_WHOLE
    return {
        "kept": {name: value for name, value in asked.items() if whole or name != "destinations"},
        "forks": spec.aims.count,
        "start": spec.aims.start,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def refused_campaign(request: object, campaign_id: str, error: ForkError) -> CampaignResult:
    """The result of a request that is not a valid CampaignRequest."""
    return campaign_result(
        CampaignSpec(campaign_id=campaign_id, source=text_of(request, "source")), {}, [], error=error
    )
