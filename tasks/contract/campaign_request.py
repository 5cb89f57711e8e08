"""The contract with schedulers for campaigns: what a CampaignRequest may say."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Discriminator, Field, InstanceOf, Tag

from tasks.contract.destinations import MOST_FORKS, Template, normal_paths
from tasks.contract.fork_request import AnyRequest, parse_as, text_of
from tasks.copier.campaign.spec import Aims, CampaignResult, CampaignSpec, OnError, campaign_result
from tasks.copier.errors import ForkError

#: A list is counted from here, as a template is by default.
_FIRST = 1
#: A request of at most so many characters is kept whole, and can be sent again when its message was lost.
_KEPT_WHOLE = 64 << 10
#: Longest deadline, in seconds: ten years.
_LONGEST = 315_360_000


class CampaignRequest(AnyRequest):
    """A request for many forks of one source, as JSON carries it."""

    destinations: Annotated[
        Annotated[list[InstanceOf[str]], Field(min_length=1, max_length=MOST_FORKS), Tag("list")]
        | Annotated[Template, Tag("template")],
        Discriminator(lambda value: "template" if isinstance(value, dict) else "list"),
    ]
    #: Forks in flight at most, so that a campaign leaves room for others; None: as many as the workers take.
    max_parallel: Annotated[int, Field(ge=1)] | None = None
    on_error: OnError = "continue"
    #: Seconds from the campaign's start; what is not published by then is cancelled. None: there is none.
    deadline: Annotated[float, Field(gt=0, le=_LONGEST)] | None = None


def campaign_of(
    request: object,
    campaign_id: str,
    *,
    owner: Literal["queue", "local"],
    queued: float = 0.0,
    clock: Callable[[], float] = time.time,
) -> tuple[CampaignSpec, list[str]]:
    """The campaign that plain data asks for, and its forks' destinations, in order.

    `queued` is how long the request waited, in seconds; `clock` is that of `Aims.deadline`. Raises ForkError
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
    """What is kept of a request: a digest of it, and all of it but a long list of destinations."""

    kept: dict[str, Any]
    forks: int
    start: int
    sha256: str


def summary_of(request: object, spec: CampaignSpec) -> Summary:
    """The summary of a request; of one that asks for no campaign, `spec` has no forks."""
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
    """The result of what could not be made a campaign of."""
    return campaign_result(
        CampaignSpec(campaign_id=campaign_id, source=text_of(request, "source")), {}, [], error=error
    )
