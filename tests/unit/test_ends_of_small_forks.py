"""The ends of small forks, stored together: each as if it were stored alone."""

from __future__ import annotations

import json
from contextlib import ExitStack

import fakeredis

from tasks.copier.fork.attempt import Published
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, succeeded
from tasks.copier.report import Totals
from tasks.fork_ledger import ForkLedger, PublishedForks
from tasks.store import keys
from tasks.store.results import Results
from tests.unit.conftest import EXPIRES


def _result(fork_id: str) -> ForkResult:
    spec = ForkSpec(fork_id=fork_id, source="/a", destination=f"/{fork_id}")
    return succeeded(spec, Totals(), 1, Clock(spec.started))


def _take(results: Results, *fork_ids: str) -> None:
    for fork_id in fork_ids:
        results.claims.take(fork_id, {"request": {}, "destination": f"/{fork_id}", "queue": "forkvm"})


def test_each_fork_has_its_result_and_its_keys_expire_with_it(results: Results, redis: fakeredis.FakeRedis) -> None:
    forks = {name: _result(name) for name in ("one", "two")}
    _take(results, *forks)

    ends = results.final.store_all(forks)

    assert [(end.result, end.has_followers) for end in ends] == [(result, False) for result in forks.values()]
    for name, result in forks.items():
        assert results.final.fork(name) == result
        assert 0 < redis.ttl(keys.CLAIM.of(name)) <= EXPIRES


def test_states_are_published_together_and_the_forks_are_no_longer_open(
    results: Results, redis: fakeredis.FakeRedis
) -> None:
    forks = {name: _result(name) for name in ("one", "two", "three")}
    _take(results, *forks)
    redis.set("celery-task-meta-three", json.dumps({"status": "REVOKED", "result": None}), ex=EXPIRES)
    with redis.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
        channel.psubscribe("celery-task-meta-*")
        channel.get_message()

        results.states.publish_all_final(forks, {"one", "three"})

        published = [json.loads((channel.get_message() or {})["data"]) for _ in forks]
    records = [results.states.get(name) for name in forks]
    assert published == records
    assert [record["status"] for record in records] == ["SUCCESS", "SUCCESS", "REVOKED"]
    assert [record["result"] for record in records[:2]] == [forks["one"], forks["two"]]
    assert redis.zrange(keys.OPEN.pattern, 0, -1) == [b"two"]


def test_a_result_that_another_process_stored_stays_and_the_other_fork_is_not_affected(results: Results) -> None:
    first, second, other = _result("one"), _result("one"), _result("two")
    second["chunks"] = 7
    _take(results, "one", "two")
    results.final.store("one", first)

    ends = results.final.store_all({"one": second, "two": other})

    assert [(end.result, end.has_followers) for end in ends] == [(first, None), (other, False)]
    assert (results.final.fork("one"), results.final.fork("two")) == (first, other)


def test_the_command_may_be_sent_again_when_its_answer_was_lost(results: Results) -> None:
    forks = {"one": _result("one")}
    _take(results, "one")

    ends = [results.final.store_all(forks) for _ in range(2)]

    assert ends[0] == ends[1]


def test_it_is_known_whether_tasks_follow_the_fork(results: Results, redis: fakeredis.FakeRedis) -> None:
    _take(results, "one", "two")
    redis.hset(keys.CANVAS.of("two"), "digest", b"{}")
    redis.expire(keys.CANVAS.of("two"), EXPIRES)

    ends = results.final.store_all({name: _result(name) for name in ("one", "two")})

    assert [end.has_followers for end in ends] == [False, True]


def test_the_staging_is_removed_after_the_result_is_stored_and_before_a_client_sees_the_state(results: Results) -> None:
    _take(results, "one")
    seen: list[tuple[bool, str]] = []

    def remove() -> None:
        seen.append((results.final.fork("one") is not None, results.states.get("one")["status"]))

    forks = PublishedForks(results)
    forks.add(Published(_result("one"), remove), ForkLedger(results, "one", {}), ExitStack())

    assert seen == [(True, "STARTED")]
    assert results.states.get("one")["status"] == "SUCCESS"
