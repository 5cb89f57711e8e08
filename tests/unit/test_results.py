"""`Results` where it uses Redis directly; with fakeredis, since no message goes through it."""

from __future__ import annotations

import json
from typing import Any

import fakeredis
import pytest

from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed, succeeded
from tasks.copier.progress import Cancellation, Progress
from tasks.copier.report import FileResult, Totals
from tasks.store import keys
from tasks.store.claims import Claim
from tasks.store.results import Results
from tests.support.pages import page_of

EXPIRES = 3600
STATE = "celery-task-meta-fork-1"


def _result(fork_id: str = "fork-1", *, cause: ForkError | None = None) -> ForkResult:
    spec = ForkSpec(fork_id=fork_id, source="/a", destination="/b-\udcff")
    clock = Clock(spec.started)
    return failed(spec, cause, Totals(), 0, clock) if cause else succeeded(spec, Totals(), 0, clock)


def _file(path: str) -> FileResult:
    return {
        "path": path,
        "type": "file",
        "method": "copy",
        "bytes": 1,
        "copied_bytes": 1,
        "seconds": 0.0,
        "reason": None,
        "error": None,
    }


def _progress(files: int, count: int, phase: str = "copy") -> Progress:
    return {"files_done": files, "files_total": 10, "bytes_done": count, "bytes_total": 100, "phase": phase}


def _store_state(redis: fakeredis.FakeRedis, status: str) -> None:
    redis.set(STATE, json.dumps({"status": status, "result": None}), ex=EXPIRES)


# -- the id


def test_the_first_claim_of_an_id_is_kept(results: Results) -> None:
    first: Claim = {"request": {"source": "/a"}, "destination": "/b", "queue": "forkvm"}
    second: Claim = {"request": None, "destination": "/c", "queue": "forkvm.rack-7"}

    assert results.claims.get("fork-1") is None
    assert results.claims.take("fork-1", first)[:2] == (first, None)
    assert results.claims.take("fork-1", second)[:2] == (first, None)
    assert results.claims.take("fork-1", first)[:2] == (first, None)
    assert results.claims.get("fork-1") == first
    assert results.claims.take("fork-2", second)[:2] == (second, None)


def test_only_the_first_claim_is_published_and_makes_the_fork_started_and_open(
    results: Results, redis: fakeredis.FakeRedis
) -> None:
    client: Any = redis
    with client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(STATE)
        channel.get_message()
        for _ in range(2):
            results.claims.take("fork-1", _claim())

        messages = [channel.get_message() for _ in range(2)]

    assert [json.loads(message["data"])["status"] for message in messages if message] == ["STARTED"]
    assert results.states.get("fork-1")["status"] == "STARTED"
    assert [job.job_id for job in results.open_jobs.of_queue("forkvm")] == ["fork-1"]


@pytest.mark.parametrize("cause", [None, ForkError(Code.NO_SPACE, "it is full", "/b-\udcff", 28)])
def test_claim_of_an_id_whose_fork_has_ended_returns_the_result(results: Results, cause: ForkError | None) -> None:
    results.claims.take("fork-1", _claim())
    results.final.store("fork-1", _result(cause=cause))

    assert results.claims.take("fork-1", _claim("forkvm.other"))[:2] == (_claim(), results.final.fork("fork-1"))


def test_id_of_a_campaign_s_fork_cannot_be_claimed_once_it_has_succeeded(
    results: Results, redis: fakeredis.FakeRedis
) -> None:
    """Its final record is all that is kept of it; with a claim, the sweep would check it again and again."""
    result = _result()
    redis.set(STATE, json.dumps({"status": "SUCCESS", "result": result}), ex=EXPIRES)

    assert results.claims.take("fork-1", _claim()).result == result

    assert results.claims.get("fork-1") is None
    assert results.open_jobs.of_queue("forkvm") == []


def test_a_new_claim_deletes_the_callbacks_of_an_earlier_job(results: Results, redis: fakeredis.FakeRedis) -> None:
    """They are kept longer than the result of their job.

    A callback of the new job would be mistaken for one that was sent.
    """
    redis.hset(keys.CANVAS.of("fork-1"), "digest", b"")

    results.claims.take("fork-1", _claim())
    redis.hset(keys.CANVAS.of("fork-1"), "digest", b"{}")
    redis.expire(keys.CANVAS.of("fork-1"), EXPIRES)
    results.claims.take("fork-1", _claim())

    assert redis.hgetall(keys.CANVAS.of("fork-1")) == {b"digest": b"{}"}


def test_claim_does_not_replace_the_state_of_a_job_whose_claim_was_lost(
    results: Results, redis: fakeredis.FakeRedis
) -> None:
    _store_state(redis, "PROGRESS")

    assert results.claims.take("fork-1", _claim())[:2] == (_claim(), None)

    assert results.states.get("fork-1")["status"] == "PROGRESS"


# -- the final result


@pytest.mark.parametrize("cause", [None, ForkError(Code.NO_SPACE, "it is full", "/b-\udcff", 28)])
def test_stored_result_is_read_back_unchanged(results: Results, cause: ForkError | None) -> None:
    assert results.final.fork("fork-1") is None
    result = _result(cause=cause)

    results.final.store("fork-1", result)

    assert results.final.fork("fork-1") == result
    assert results.final.fork("fork-2") is None


def test_ids_are_reserved_in_one_command_without_a_state(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.claims.take("fork-2", _claim("forkvm.other"))
    results.cancellations.request("fork-3")

    first, second, third = results.claims.take_all(
        {"fork-1": _claim(), "fork-2": _claim(), "fork-3": _claim()}, started=False
    )

    assert (first.is_new, first.holder, first.cancellation) == (True, _claim(), Cancellation.NOT_REQUESTED)
    assert (second.is_new, second.holder) == (False, _claim("forkvm.other"))
    assert (third.is_new, third.cancellation) == (True, Cancellation.REQUESTED)
    assert results.states.get("fork-1")["status"] == "PENDING"
    assert results.claims.take("fork-1", _claim()).is_new is False
    assert results.states.get("fork-1")["status"] == "STARTED"  # if the normal path continues it


def test_result_and_cancellation_are_read_in_one_command(results: Results) -> None:
    assert results.final.status("fork-1") == (None, Cancellation.NOT_REQUESTED)
    result = _result("fork-2")
    results.cancellations.request("fork-1")
    results.final.store("fork-2", result)

    assert results.final.status("fork-1") == (None, Cancellation.REQUESTED)
    assert results.final.status("fork-2") == (result, Cancellation.NOT_REQUESTED)


def test_stored_values_are_ascii_json(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.final.store("fork-1", _result())

    stored = redis.get("forkvm:fork-1:result")
    assert isinstance(stored, bytes)
    assert json.loads(stored.decode("ascii"))["destination"] == "/b-\udcff"


# -- pages


def test_pages_are_read_in_the_order_plan_chunks_close(results: Results) -> None:
    for part in ("close", "10", "2", "0", "plan"):
        results.pages.store("fork-1", {part: [page_of([_file(f"{part}-{n}")]) for n in range(2)]})

    paths = [file["path"] for file in results.pages.files("fork-1")]

    assert paths == [f"{part}-{n}" for part in ("plan", "0", "2", "10", "close") for n in range(2)]


def test_pages_stored_again_replace_the_earlier_ones(results: Results) -> None:
    results.pages.store("fork-1", {"0": [page_of([_file("a")]), page_of([_file("b")])]})
    results.pages.store("fork-1", {"0": [page_of([_file("c")]), page_of([_file("d")])]})

    assert [file["path"] for file in results.pages.files("fork-1")] == ["c", "d"]


def test_pages_stored_by_a_new_attempt_are_the_only_ones(results: Results) -> None:
    """Parts of an earlier attempt that this one does not have would be counted too."""
    results.pages.store("fork-1", {"plan": [page_of([_file("a")])], "7": [page_of([_file("b")])]})

    results.pages.store("fork-1", {"plan": [page_of([_file("c")])]}, replace_all=True)
    results.pages.store("fork-1", {"0": [page_of([_file("d")])]})

    assert [file["path"] for file in results.pages.files("fork-1")] == ["c", "d"]


def test_parts_whose_pages_are_lost_are_found(results: Results) -> None:
    results.pages.store("fork-1", {"plan": [page_of([_file("a")])], "1": [], "2": [page_of([_file("b")])]})

    assert results.pages.missing("fork-1", ["plan", "0", "1", "2", "3"]) == ["0", "3"]
    assert results.pages.missing("fork-2", ["plan"]) == ["plan"]


@pytest.mark.parametrize("paths", [[], [["e", "f"]], [["e", "f"], ["g"]]])
def test_pages_of_a_fork_without_parts_are_the_only_ones(results: Results, paths: list[list[str]]) -> None:
    results.pages.store_all({"fork-1": [page_of([_file("a")])]})
    results.pages.store("fork-1", {"plan": [page_of([_file("b")])], "7": [page_of([_file("c")])]})

    results.pages.store_all({"fork-1": [page_of([_file(path) for path in page]) for page in paths]})

    assert [file["path"] for file in results.pages.files("fork-1")] == [path for page in paths for path in page]


def test_only_page_of_a_fork_has_one_key(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.pages.store_all({"fork-1": [page_of([_file("a")])]})

    assert list(redis.scan_iter("forkvm:*")) == [b"forkvm:fork-1:page"]


def test_fewer_pages_stored_again_leave_none_of_the_earlier_ones(results: Results) -> None:
    """A chunk that was killed and made again may have other pages than before."""
    results.pages.store("fork-1", {"0": [page_of([_file("a")]), page_of([_file("b")])]})
    results.pages.store("fork-1", {"0": [page_of([_file("a"), _file("b")])]})

    assert [file["path"] for file in results.pages.files("fork-1")] == ["a", "b"]


def test_the_index_of_pages_does_not_grow_with_their_size(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.pages.store("fork-1", {"0": [page_of([_file(str(n))]) for n in range(300)]})

    assert redis.hgetall("forkvm:fork-1:pages") == {b"0": b"300"}
    assert [file["path"] for file in results.pages.files("fork-1")] == [str(n) for n in range(300)]


def test_pages_stored_so_far_are_read_and_expired_ones_skipped(results: Results, redis: fakeredis.FakeRedis) -> None:
    assert list(results.pages.files("fork-1")) == []
    results.pages.store("fork-1", {"plan": []})
    results.pages.store("fork-1", {"0": [page_of([_file("a\udcff")])]})
    results.pages.store("fork-1", {"1": [page_of([_file("b")])]})
    redis.delete("forkvm:fork-1:page:1:0")

    assert list(results.pages.files("fork-1")) == [_file("a\udcff")]


def test_pages_of_two_forks_are_separate(results: Results) -> None:
    results.pages.store("fork-1", {"0": [page_of([_file("a")])]})
    results.pages.store("fork-2", {"0": [page_of([_file("b")])]})

    assert [file["path"] for file in results.pages.files("fork-1")] == ["a"]


def test_storing_pages_returns_whether_cancellation_was_requested(results: Results) -> None:
    kept = [page_of([_file("a")])]
    before = [results.pages.store("fork-1", {"0": kept}), results.pages.store("fork-1", {})]
    before += results.pages.store_all({"fork-1": kept})

    results.cancellations.request("fork-1")

    after = [results.pages.store("fork-1", {"0": kept}), results.pages.store("fork-1", {})]
    after += results.pages.store_all({"fork-1": kept})
    assert (before, after) == ([Cancellation.NOT_REQUESTED] * 3, [Cancellation.REQUESTED] * 3)


# -- progress


def test_state_is_pending_for_an_unknown_id(results: Results) -> None:
    assert results.states.get("fork-1") == {"status": "PENDING", "result": None}


def test_progress_is_the_sum_over_the_parts_in_celerys_form(results: Results) -> None:
    results.states.publish_progress("fork-1", "plan", _progress(1, 10))
    results.states.publish_progress("fork-1", "0", _progress(2, 20))
    results.states.publish_progress("fork-1", "1", _progress(3, 30))
    results.states.publish_progress("fork-1", "0", _progress(4, 40))

    state = results.states.get("fork-1")
    assert state["status"] == "PROGRESS"
    assert state["task_id"] == "fork-1"
    assert state["result"] == {
        "files_done": 8,
        "files_total": 10,
        "bytes_done": 80,
        "bytes_total": 100,
        "phase": "copy",
    }


@pytest.mark.parametrize("status", ["STARTED", "PENDING", "RETRY", "PROGRESS"])
def test_progress_follows_every_state_that_is_not_final(
    results: Results, redis: fakeredis.FakeRedis, status: str
) -> None:
    _store_state(redis, status)

    results.states.publish_progress("fork-1", "0", _progress(1, 1))

    assert results.states.get("fork-1")["status"] == "PROGRESS"


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "REVOKED"])
def test_progress_never_overwrites_a_final_state(results: Results, redis: fakeredis.FakeRedis, status: str) -> None:
    _store_state(redis, status)

    results.states.publish_progress("fork-1", "0", _progress(1, 1))

    assert results.states.get("fork-1")["status"] == status


def test_progress_does_not_overwrite_a_final_state_stored_at_the_same_time(
    results: Results,
    redis: fakeredis.FakeRedis,
    server: fakeredis.FakeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state is written only if it was not written since it was read."""
    other = fakeredis.FakeRedis(server=server)
    reads: list[str] = []
    loads = json.loads

    def loads_and_finish(data: Any) -> Any:
        decoded = loads(data)
        if isinstance(decoded, dict) and decoded.get("status") == "STARTED" and not reads:
            reads.append("STARTED")
            _store_state(other, "SUCCESS")
        return decoded

    _store_state(redis, "STARTED")
    monkeypatch.setattr("tasks.store.connection.json.loads", loads_and_finish)

    results.states.publish_progress("fork-1", "0", _progress(1, 1))

    assert reads
    assert results.states.get("fork-1")["status"] == "SUCCESS"
    other.close()


def test_progress_is_published_for_waiting_clients(results: Results, redis: fakeredis.FakeRedis) -> None:
    with redis.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
        channel.subscribe(STATE)
        channel.get_message(timeout=1)

        results.states.publish_progress("fork-1", "0", _progress(1, 1))

        message = channel.get_message(timeout=1)
    assert message is not None
    assert json.loads(message["data"])["status"] == "PROGRESS"


# -- cancellation


def test_cancellation_affects_one_fork_even_before_it_starts(results: Results) -> None:
    assert not results.cancellations.is_requested("fork-1")

    results.cancellations.request("fork-1")
    results.cancellations.request("fork-1")

    assert results.cancellations.is_requested("fork-1")
    assert not results.cancellations.is_requested("fork-2")


# -- forks without an end


def _claim(queue: str = "forkvm") -> Claim:
    return {"request": {"source": "/a"}, "destination": "/b", "queue": queue}


def test_fork_is_open_from_its_claim_until_its_result_and_state_are_stored(
    results: Results, redis: fakeredis.FakeRedis
) -> None:
    results.claims.take("fork-1", _claim())
    results.claims.take("fork-2", _claim("forkvm.rack-7"))

    assert [(job.job_id, job.heartbeat) for job in results.open_jobs.of_queue("forkvm")] == [("fork-1", -1)]
    assert [job.job_id for job in results.open_jobs.of_queue("forkvm.rack-7")] == ["fork-2"]
    results.final.store("fork-1", _result())
    assert [job.claim for job in results.open_jobs.of_queue("forkvm")] == [_claim()]
    _store_state(redis, "SUCCESS")
    assert results.open_jobs.of_queue("forkvm") == []
    assert redis.zrange("forkvm:open", 0, -1) == [b"fork-2"]


def test_heartbeat_is_stored_only_for_an_open_fork(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.claims.take("fork-1", _claim())

    results.open_jobs.store_heartbeat("fork-1", 1_764_028_800_123)
    results.open_jobs.store_heartbeat("fork-2", 5)

    assert [(job.job_id, job.heartbeat) for job in results.open_jobs.of_queue("forkvm")] == [
        ("fork-1", 1_764_028_800_123)
    ]


def test_a_second_claim_keeps_the_heartbeat(results: Results) -> None:
    results.claims.take("fork-1", _claim())
    results.open_jobs.store_heartbeat("fork-1", 7)

    results.claims.take("fork-1", _claim())

    assert results.open_jobs.of_queue("forkvm")[0].heartbeat == 7


def test_fork_whose_claim_has_expired_is_forgotten(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.claims.take("fork-1", _claim())
    redis.delete("forkvm:fork-1:claim")

    assert results.open_jobs.of_queue("forkvm") == []
    assert redis.zcard("forkvm:open") == 0


def test_periodic_work_is_started_by_one_worker_per_interval(results: Results, redis: fakeredis.FakeRedis) -> None:
    assert results.periodic_work.start(keys.SWEEP, "forkvm", 60)
    assert not results.periodic_work.start(keys.SWEEP, "forkvm", 60)
    assert results.periodic_work.start(keys.SWEEP, "forkvm.rack-7", 60)
    results.periodic_work.set_due(keys.SWEEP, "forkvm", 5)

    assert redis.ttl("forkvm:sweep:forkvm") == 5


def test_losses_are_counted_for_each_message(results: Results) -> None:
    counts = [results.open_jobs.count_loss(message) for message in ("fork-1", "fork-1", "fork-1.chunk.0")]

    assert counts == [1, 2, 1]
