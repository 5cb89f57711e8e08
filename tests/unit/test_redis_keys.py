"""The table of Redis keys: the code, the scripts and the document agree with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest

from tasks.copier.campaign.spec import Aims, CampaignSpec, campaign_result
from tasks.copier.errors import Code
from tasks.store import keys, lua
from tasks.store.campaign.results import CampaignResults
from tasks.store.keys import OF_KOMBU, TABLE, Lifetime
from tasks.store.results import Results
from tasks.store.workers import WorkerRecord
from tests.support.redis_keys import is_unlisted, kind_of
from tests.unit.test_campaign_results import outcomes

ROOT = Path(__file__).parents[2]
EXPIRES = 3600
SCRIPTS = sorted((ROOT / "tasks/store/lua").glob("*.lua"))


def write_every_key(results: Results) -> None:
    """Write each key of the table once, for the campaign and fork `c`."""
    campaign = CampaignResults(results, "c")
    results.claims.take("c", {"request": {}, "destination": "/b", "queue": "forkvm"})
    results.pages.store("c", {"0": [b"page", b"page"]})
    results.redis.set(keys.ONLY_PAGE.of("c"), b"page", ex=results.open_expires)
    results.states.publish_progress(
        "c", "0", {"files_done": 1, "files_total": 1, "bytes_done": 1, "bytes_total": 1, "phase": "copy"}
    )
    results.cancellations.request("c")
    results.open_jobs.count_loss("c")
    results.redis.hset(keys.CANVAS.of("c"), "digest", b"")
    results.redis.expire(keys.CANVAS.of("c"), results.open_expires)
    results.redis.set(keys.SENDING.of("c"), b"1", ex=keys.SENDING_SECONDS)
    campaign.store_outcomes(0, outcomes(0, 1) + outcomes(1, 1, Code.NO_SPACE))
    campaign.end_batch(0, [0])
    for work in (keys.SWEEP, keys.WALK):
        results.periodic_work.start(work, "forkvm", 60)
    results.workers.keep(WorkerRecord("w@host", "1.0", "host", ["forkvm"], 2))


def test_keys_of_an_ended_job_expire_as_the_table_says() -> None:
    redis = fakeredis.FakeRedis()
    results = Results(redis, EXPIRES, lambda job_id: f"celery-task-meta-{job_id}")
    write_every_key(results)
    open_ttls = {key.decode(): redis.ttl(key) for key in redis.scan_iter()}

    spec = CampaignSpec(campaign_id="c", source="/a", aims=Aims(count=2))
    results.final.store("c", campaign_result(spec, {}, [], error=None))

    ttls = {key.decode(): redis.ttl(key) for key in redis.scan_iter()}
    own = {key: ttl for key, ttl in ttls.items() if key.startswith("forkvm:c:") or key == "forkvm:open"}
    assert [key for key in ttls if is_unlisted(key)] == []
    assert {kind_of(key) for key in ttls} == set(TABLE)
    types = {key: cast("bytes", redis.type(key)).decode() for key in own}
    assert types == {key: kind_of(key).type for key in own}
    assert {key for key in own if kind_of(key).lifetime is Lifetime.JOB} == {
        key for key, ttl in own.items() if keys.SENDING_SECONDS < ttl <= EXPIRES and "losses" not in key
    }
    open_ones = [key for key in open_ttls if kind_of(key).lifetime in (Lifetime.JOB, Lifetime.OPEN)]
    assert {open_ttls[key] for key in open_ones} <= {keys.OPEN_SECONDS, keys.OPEN_SECONDS - 1}


@pytest.mark.parametrize("key", ["forkvm:c:other", "_kombu.other", "p:_kombu.binding_other.x", "x.other.celery.pidbox"])
def test_a_key_that_no_table_has_is_noticed(key: str) -> None:
    assert is_unlisted(key)


def test_a_job_that_reuses_an_id_finds_no_keys_of_the_earlier_one() -> None:
    redis = fakeredis.FakeRedis()
    results = Results(redis, EXPIRES, lambda job_id: f"celery-task-meta-{job_id}")
    write_every_key(results)
    redis.delete(keys.CLAIM.of("c"))

    results.claims.take("c", {"request": {}, "destination": "/b", "queue": "forkvm"})

    left = {kind_of(key.decode()) for key in redis.scan_iter("forkvm:c:*")}
    assert left == {keys.CLAIM, keys.CANCEL, keys.PART_PAGE}  # without `pages`, nobody reads the pages of parts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_uses_only_keys_of_the_table(script: Path) -> None:
    names = set(re.findall(r"(?:own|prefix) \.\. '(\w+):?", script.read_text()))

    assert names <= {key.name.partition(":")[0] for key in TABLE}


def test_each_script_has_a_file_and_each_file_is_used() -> None:
    scripts = [script for script in vars(lua).values() if isinstance(script, lua.Script)]

    assert sorted(script.name for script in scripts) == [path.stem for path in SCRIPTS]


def test_a_script_refuses_a_wrong_name() -> None:
    values: dict[str, Any] = {"cancel_key": "c", "result_key": "r", "flag": b"1", "expires": 1}

    with pytest.raises(TypeError, match=r"cancel\.lua takes cancel_key, result_key, flag, ttl"):
        lua.CANCEL.run(fakeredis.FakeRedis(), **values)


def test_the_document_contains_the_tables() -> None:
    rows = [f"| `{key.pattern}` | {key.type} | {key.holds} | {key.lifetime.value} |" for key in (*TABLE, *OF_KOMBU)]
    document = (ROOT / "docs/redis-keys.md").read_text()

    assert [line for line in document.splitlines() if line.startswith("| `")] == rows
