"""What a scheduler does: `python program.py BROKER BACKEND GUESTS`. Needs nothing but Celery; prints its version.

GUESTS has the guest directory `a`. Any other end than the right one is an AssertionError.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import celery
from celery import Celery, chain, group, signature

_SECONDS = 30


def main(broker: str, backend: str, guests: str) -> None:
    """Send a fork and a campaign in each way, and check what becomes of them."""
    app = Celery("scheduler", broker=broker, backend=backend)

    def request(name: str) -> dict[str, Any]:
        return {"source": f"{guests}/a", "destination": f"{guests}/{name}"}

    def fork(name: str, **options: Any) -> Any:
        return app.send_task("forkvm.fork", kwargs={"request": request(name)}, queue="forkvm", **options)

    def step(name: str, **options: Any) -> Any:
        return signature("forkvm.fork", kwargs={"request": request(name)}, queue="forkvm", app=app, **options)

    assert fork("one", task_id="one").get(timeout=_SECONDS)["status"] == "succeeded"
    assert fork("packed", compression="gzip").get(timeout=_SECONDS)["status"] == "succeeded"

    failed = fork("one")
    assert "destination_exists" in str(failed.get(timeout=_SECONDS, propagate=False))
    assert failed.state == "FAILURE"

    campaign = {"source": f"{guests}/a", "destinations": {"template": guests + "/vm-{n}", "count": 5}}
    sent = app.send_task("forkvm.campaign", kwargs={"request": campaign}, queue="forkvm")
    assert sent.get(timeout=_SECONDS)["forks"]["succeeded"] == 5

    results = group(step(f"of-group-{number}") for number in range(3)).apply_async().get(timeout=_SECONDS)
    assert [result["status"] for result in results] == ["succeeded"] * 3
    last = chain(step("first"), step("second", immutable=True)).apply_async().get(timeout=_SECONDS)
    assert last["destination"] == f"{guests}/second"

    revoked = fork("revoked", countdown=5)
    revoked.revoke()
    deadline = time.monotonic() + _SECONDS
    while revoked.state != "REVOKED":
        assert time.monotonic() < deadline, revoked.state
        time.sleep(0.1)
    assert not os.path.lexists(f"{guests}/revoked")
    print(celery.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # old versions report errors while the interpreter ends
