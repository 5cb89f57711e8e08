"""Workers that are killed or paused: another one takes over their work, and no late write reaches a fork."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from celery import Celery

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker, Worker, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_slow_file
from tests.support.processor import wait_until_asleep
from tests.support.tree import snapshot

#: Chunks that take a fraction of a second each.
SMALL_CHUNKS = {"FORKVM_INLINE_BYTES": "0", "FORKVM_CHUNK_BYTES": str(32 << 20)}


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("tmpfs")
    (workdir / "vm-1").mkdir()
    for n in range(3):
        make_slow_file(workdir / "vm-1" / f"disk-{n}")
    return workdir


def send(client: Celery, workdir: Path, fork_id: str) -> None:
    request = {"source": str(workdir / "vm-1"), "destination": str(workdir / "vm-2")}
    client.send_task("forkvm.fork", kwargs={"request": request}, task_id=fork_id, queue="forkvm")


def is_chunk_begun(workdir: Path) -> bool:
    return any(workdir.glob(".forkvm-*/chunk-*"))


def group(worker: Worker, number: signal.Signals) -> None:
    os.killpg(worker.pid, number)


def test_a_long_task_is_delivered_once_while_its_worker_runs(
    workdir: Path, start_worker: StartWorker, foreign_client: Celery, redis_server: RedisServer
) -> None:
    """Tests the lease with the installed kombu: without it the message would be delivered again after 5 s."""
    short = {"FORKVM_VISIBILITY_TIMEOUT": "5"}
    workers = [start_worker(workdir, env=short, include="tests.support.system.long_task") for _ in range(2)]

    foreign_client.send_task("tests.long_task", kwargs={"seconds": 11}, task_id="long", queue="forkvm")

    assert foreign_client.AsyncResult("long").get(timeout=40) == "done"
    assert sum(worker.output().count("tests.long_task[long] received") for worker in workers) == 1


def test_a_paused_worker_loses_its_fork_and_writes_nothing_into_the_published_fork(
    workdir: Path, start_worker: StartWorker, foreign_client: Celery, redis_server: RedisServer
) -> None:
    short = {**SMALL_CHUNKS, "FORKVM_VISIBILITY_TIMEOUT": "5"}
    paused_worker = start_worker(workdir, env=short)
    send(foreign_client, workdir, "f1")
    wait_until(lambda: is_chunk_begun(workdir), "a running chunk")
    group(paused_worker, signal.SIGSTOP)
    try:
        other = start_worker(workdir, env={**short, "FORKVM_LOG": "json"})
        result = foreign_client.AsyncResult("f1").get(timeout=90)
        published = snapshot(workdir / "vm-2")
        changes = {path: path.stat().st_ctime_ns for path in (workdir / "vm-2").rglob("*")}
    finally:
        group(paused_worker, signal.SIGCONT)
    wait_until_asleep(lambda: paused_worker.children, "the paused worker to be idle")

    assert result["status"] == "succeeded"
    assert snapshot(workdir / "vm-2") == published
    assert {path: path.stat().st_ctime_ns for path in (workdir / "vm-2").rglob("*")} == changes
    assert sorted(path.name for path in workdir.iterdir()) == ["vm-1", "vm-2"]
    assert foreign_client.AsyncResult("f1").get(timeout=5) == result
    warnings = [json.loads(line) for line in other.output().splitlines() if "again: " in line or "was taken" in line]
    assert warnings
    assert [line["event"] for line in warnings if line["level"] == "warning" and line.get("fork_id") != "f1"] == []
    paused_worker.kill()  # its warm shutdown waits for its task


def test_malformed_entries_among_the_messages_of_lost_workers_are_named_once_and_hinder_no_other(
    workdir: Path, start_worker: StartWorker, foreign_client: Celery, redis_server: RedisServer
) -> None:
    # Given entries that are no messages, and behind them the message of a lost worker
    secret = "a-guests-secret"
    entries: dict[str, object] = {
        "no list": secret,
        "too short": [secret],
        "no message": [secret, "", "forkvm"],
        "no headers": [{"headers": [secret], "properties": {"delivery_info": {}}}, "", "forkvm"],
        "no exchange": [{"headers": {}, "properties": {"delivery_info": {}}, "body": secret}, {}, "forkvm"],
    }
    send(foreign_client, workdir, "lost")
    with redis_server.client() as redis:
        message = json.loads(redis.rpop("forkvm"))
        entries["lost"] = [message, "", "forkvm"]
        taken = {tag: json.dumps(entry) for tag, entry in entries.items()} | {"no JSON": secret, "deep": "[" * 100_000}
        redis.hset("forkvm:unacked", mapping=taken)
        redis.zadd("forkvm:unacked_index", dict.fromkeys(taken, 2) | {"lost": 1})

        # When
        worker = start_worker(workdir, env={"FORKVM_VISIBILITY_TIMEOUT": "5"})

        # Then
        assert foreign_client.AsyncResult("lost").get(timeout=40)["status"] == "succeeded"
        wait_until(lambda: not redis.zcard("forkvm:unacked_index"), "the end of the search")
        warnings = [line for line in worker.output().splitlines() if "is not a message, and is left there" in line]
        assert len(warnings) == len(taken) - 1
        assert all(sum(f"the entry {tag!r} of" in line for line in warnings) == 1 for tag in taken if tag != "lost")
        assert "Error in timer" not in worker.output()
        assert secret not in worker.output()
        redis.delete("forkvm:unacked")
