"""Redis Sentinel: forks continue when the master is lost and a replica becomes the master."""

from __future__ import annotations

import json
from pathlib import Path

from celery import Celery

from tests.fixtures.processes import RunForkvm, StartWorker, wait_until
from tests.fixtures.sentinels import MASTER, PASSWORD, SENTINEL_PASSWORD, Sentinels
from tests.support.guests import make_guest

_FORKS = 60


def test_no_fork_is_lost_when_the_master_is_lost_under_load(
    sentinels: Sentinels, start_worker: StartWorker, run_forkvm: RunForkvm, tmp_path: Path
) -> None:
    # Given a worker that reads its passwords from files
    source = make_guest(tmp_path / "guests" / "a")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "forkvm_redis_password").write_text(PASSWORD)
    (secrets / "forkvm_sentinel_password").write_text(SENTINEL_PASSWORD)
    environment = {
        "FORKVM_BROKER_URL": sentinels.url,
        "FORKVM_RESULT_BACKEND": "",
        "FORKVM_SENTINEL_MASTER": MASTER,
        "FORKVM_SECRETS_DIR": str(secrets),
    }
    worker = start_worker(tmp_path / "guests", 2, command="forkvm", env=environment)
    scheduler = _scheduler(sentinels)

    def send(n: int) -> None:
        request = {"source": str(source), "destination": f"{source.parent}/{n}"}
        scheduler.send_task("forkvm.fork", kwargs={"request": request}, task_id=f"f{n}", queue="forkvm")

    # When the master is lost while forks are sent
    for n in range(_FORKS):
        send(n)
        if n == _FORKS // 2:
            sentinels.kill_master()

    # Then each fork succeeds. Jobs that were lost with the master are sent again under their ids, as docs/contract.md
    # says.
    def ended() -> set[int]:
        with sentinels.client(sentinels.replica) as client:
            metas = client.mget([f"celery-task-meta-f{n}" for n in range(_FORKS)])
        return {n for n, meta in enumerate(metas) if meta and json.loads(meta)["status"] == "SUCCESS"}

    def waiting() -> int:
        with sentinels.client(sentinels.replica) as client:
            return int(client.llen("forkvm"))

    wait_until(lambda: waiting() == 0 and len(ended()) >= _FORKS - 5, "the forks", 60)
    for n in set(range(_FORKS)) - ended():
        send(n)
    wait_until(lambda: len(ended()) == _FORKS, "every fork", 60)
    assert all((source.parent / str(n) / "overlay.raw").exists() for n in range(_FORKS))
    done = run_forkvm("submit", source, source.parent / "last", "--wait", env=environment)
    assert done.returncode == 0, done.stderr
    assert run_forkvm("doctor", env=environment).stdout.count("reached without TLS, on this host") == 1
    assert PASSWORD not in worker.output()
    assert SENTINEL_PASSWORD not in worker.output()
    scheduler.close()


def _scheduler(sentinels: Sentinels) -> Celery:
    """A client as in any Celery application, which passes the passwords in its own way."""
    broker = sentinels.url.replace("sentinel://", "sentinel://:of%2Fredis@")
    scheduler = Celery("scheduler", broker=broker, set_as_current=False)
    scheduler.conf.broker_transport_options = {
        "master_name": MASTER,
        "sentinel_kwargs": {"password": SENTINEL_PASSWORD},
    }
    scheduler.conf.task_publish_retry_policy = {"max_retries": None, "interval_start": 0, "interval_step": 0.2}
    return scheduler
