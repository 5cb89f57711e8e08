"""The ends of small forks, stored together: each as if it were stored alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import fakeredis
import pytest
from redis.exceptions import ConnectionError, OutOfMemoryError, ReadOnlyError, ResponseError

from tasks.complete_forks import CompleteForks
from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.completion import CompleteFork
from tasks.copier.fork.lifecycle import begin
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, succeeded
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.report import Totals
from tasks.copier.roots import Roots
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.takeover import take_over
from tasks.fork_ledger import ForkLedger
from tasks.store import keys
from tasks.store.pages import Pages
from tasks.store.results import Results
from tests.support.engine.forks import INLINE, leftovers, never_stop, spec_of
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


class _Turn:
    """Some forks of one file, complete and not yet ended."""

    def __init__(self, results: Results, directory: Path, *fork_ids: str) -> None:
        self.results, self.directory = results, directory
        self.forks = CompleteForks(results, most=len(fork_ids) + 1)
        (directory / "source").mkdir()
        (directory / "source" / "disk").write_bytes(b"disk")
        _take(results, *fork_ids)
        for fork_id in fork_ids:
            self._add(fork_id)

    def _add(self, fork_id: str) -> None:
        spec, ledger = spec_of(self.directory / "source", self.directory / fork_id, fork_id), self.ledger(fork_id)
        with ExitStack() as opened:
            ends = opened.enter_context(open_endpoints(Roots(), spec.source, spec.destination))
            staging = opened.enter_context(Staging.claim(ends.parent_fd, fork_id, wait=0))
            fork = begin(ends, staging, spec, INLINE, Ticker(never_stop), ledger)
            assert isinstance(fork, CompleteFork)
            self.forks.add(fork, ledger, opened.pop_all())

    def ledger(self, fork_id: str) -> ForkLedger:
        return ForkLedger(self.results, fork_id, {})

    def made(self) -> set[str]:
        return set(os.listdir(self.directory)) - {"source"}

    def code(self, fork_id: str) -> str | None:
        """The error code of a fork that has ended."""
        result = self.results.final.fork(fork_id)
        assert result is not None
        return None if result["error"] is None else result["error"]["code"]

    def states(self, *fork_ids: str) -> list[str]:
        return [self.results.states.get(fork_id)["status"] for fork_id in fork_ids]


@pytest.fixture
def turn(results: Results, tmp_path: Path) -> _Turn:
    return _Turn(results, tmp_path, "one", "two", "three")


def test_forks_are_ended_together(turn: _Turn) -> None:
    assert leftovers(turn.directory) == sorted(turn.made())

    turn.forks.end()

    assert turn.made() == {"one", "two", "three"}
    assert turn.states("one", "two", "three") == ["SUCCESS"] * 3
    for fork_id in turn.made():
        assert [result["path"] for result in turn.results.pages.files(fork_id)] == ["disk"]
        assert turn.code(fork_id) is None


def test_one_that_was_cancelled_and_one_that_cannot_be_published_do_not_affect_the_others(turn: _Turn) -> None:
    turn.results.cancellations.request("one")
    (turn.directory / "two").mkdir()

    turn.forks.end()

    assert turn.states("one", "two", "three") == ["REVOKED", "FAILURE", "SUCCESS"]
    assert turn.made() == {"two", "three"}
    assert os.listdir(turn.directory / "two") == []
    assert turn.code("two") == "destination_exists"


def test_one_that_has_ended_in_another_process_keeps_its_result_and_is_not_made_again(turn: _Turn) -> None:
    earlier = _result("two")
    turn.results.final.store("two", earlier)

    turn.forks.end()

    assert turn.results.final.fork("two") == earlier
    assert turn.made() == {"one", "three"}
    assert turn.states("one", "two", "three") == ["SUCCESS"] * 3


def test_one_whose_staging_was_taken_over_is_left_to_the_process_that_took_it(turn: _Turn) -> None:
    parent_fd = os.open(turn.directory, os.O_RDONLY)
    taken = take_over(parent_fd, "two", _heartbeat(parent_fd, "two"))
    os.close(parent_fd)
    assert taken is not None

    turn.forks.end()

    assert turn.results.final.fork("two") is None
    assert turn.states("one", "two", "three") == ["SUCCESS", "STARTED", "SUCCESS"]
    assert not (turn.directory / "two").exists()


def test_only_those_whose_file_results_redis_refuses_fail(turn: _Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    store_all = Pages.store_all

    def refuse_two(pages: Pages, forks: Mapping[str, list[bytes]]) -> list[Cancellation]:
        if "two" in forks:
            raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'")
        return store_all(pages, forks)

    monkeypatch.setattr(Pages, "store_all", refuse_two)

    turn.forks.end()

    assert turn.states("one", "two", "three") == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert turn.code("two") == "no_space"
    assert turn.made() == {"one", "three"}


@pytest.mark.parametrize("text", ["READONLY You can't write against a read only replica.", "MISCONF no disk"])
def test_a_redis_that_refuses_writes_for_now_fails_no_fork(
    turn: _Turn, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def refuse(pages: Pages, forks: Mapping[str, list[bytes]]) -> list[Cancellation]:
        raise (ReadOnlyError if text.startswith("READONLY") else ResponseError)(text)

    with monkeypatch.context() as patch:
        patch.setattr(Pages, "store_all", refuse)
        with pytest.raises(ResponseError):
            turn.forks.try_to_end()
    turn.forks.try_to_end()

    assert turn.states("one", "two", "three") == ["SUCCESS"] * 3
    assert turn.made() == {"one", "two", "three"}


def test_a_fork_whose_pages_have_a_key_of_another_type_fails_with_the_answer_of_redis(
    turn: _Turn, redis: fakeredis.FakeRedis
) -> None:
    redis.set(keys.PAGES.of("two"), "not a hash")

    with pytest.raises(ForkError, match="WRONGTYPE") as refused:
        turn.ledger("two").keep_pages({"0": [b"page"]})

    assert refused.value.code is Code.IO_ERROR


@pytest.mark.parametrize("step", ["pages", "results", "states"])
def test_while_redis_is_away_forks_are_kept_and_then_ended_once(
    turn: _Turn, redis: fakeredis.FakeRedis, server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    # Given a Redis that is away from one step on
    with monkeypatch.context() as patch:
        if step == "pages":
            server.connected = False
        else:
            part = turn.results.final if step == "results" else turn.results.states
            patch.setattr(type(part), "store_all" if step == "results" else "publish_all_final", _away)

        # When
        with pytest.raises(ConnectionError):
            turn.forks.try_to_end()
    server.connected = True
    published = {path: (turn.directory / path).stat().st_ino for path in turn.made() if not path.startswith(".")}
    turn.forks.try_to_end()

    # Then
    assert len(published) == (0 if step == "pages" else 3)
    assert turn.made() == {"one", "two", "three"}
    assert published.items() <= {path: (turn.directory / path).stat().st_ino for path in turn.made()}.items()
    assert turn.states("one", "two", "three") == ["SUCCESS"] * 3


def _heartbeat(parent_fd: int, fork_id: str) -> int:
    with Staging.peek(parent_fd, fork_id) as staging:
        assert staging is not None
        return staging.heartbeat()


def _away(*args: object) -> None:
    raise ConnectionError


def test_the_staging_is_removed_after_the_result_is_stored_and_before_a_client_sees_the_state(
    turn: _Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, list[str]]] = []
    remove = CompleteFork.remove_staging

    def look_and_remove(fork: CompleteFork) -> None:
        seen.append((turn.results.final.fork("one") is not None, turn.states("one")))
        remove(fork)

    monkeypatch.setattr(CompleteFork, "remove_staging", look_and_remove)

    turn.forks.end()

    assert seen == [(True, ["STARTED"])] * 3
    assert turn.states("one") == ["SUCCESS"]
