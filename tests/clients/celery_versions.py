"""Each version of Celery that clients may have: forks, campaigns, errors, canvas and revoke against one worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_guest

_PROGRAM = Path(__file__).parent / "program.py"
#: Of each version of Celery: itself, and the versions of kombu and redis-py that were current with it.
_VERSIONS = [
    ("celery==5.2.7", "kombu==5.2.4", "redis<5"),
    ("celery==5.3.6", "kombu==5.3.7", "redis<6"),
    ("celery==5.4.0", "kombu==5.4.2", "redis<6"),
    ("celery==5.5.3", "kombu==5.5.4", "redis<6"),
    ("celery==5.6.2", "kombu<5.8", "redis"),
    ("celery==5.7.0", "kombu<5.8", "redis"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("packages", _VERSIONS, ids=lambda packages: packages[0])
def test_a_client_gets_its_results(
    start_worker: StartWorker, redis_server: RedisServer, fresh: Fresh, tmp_path: Path, packages: tuple[str, ...]
) -> None:
    # Given
    installed, guests = tmp_path / "packages", fresh("xfs")
    make_guest(guests / "a")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(installed)]
    subprocess.run([*pip, *packages, "packaging", "setuptools<81"], check=True)
    start_worker(guests, 2, command="forkvm")

    # When
    done = subprocess.run(
        [sys.executable, "-S", "-s", str(_PROGRAM), redis_server.broker_url, redis_server.backend_url, str(guests)],
        env={"PYTHONPATH": str(installed)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )

    # Then
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == packages[0].removeprefix("celery==")
    assert [path.name for path in guests.iterdir() if path.name.startswith(".forkvm")] == []
