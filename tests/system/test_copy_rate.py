"""The copy rate and the I/O priority of real workers."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import RunForkvm, StartWorker
from tests.support.engine.forks import MIB
from tests.support.guests import make_sparse_file
from tests.support.requirements import require_command
from tests.support.system.scheduler import Scheduler

_RATE = 16 * MIB
#: The bytes that each of three forks copies.
_SIZE = 24 * MIB


def test_two_workers_and_a_local_fork_together_stay_within_the_copy_rate(
    start_worker: StartWorker,
    own_scheduler: Scheduler,
    run_forkvm: RunForkvm,
    fresh: Fresh,
    tmp_path: Path,
) -> None:
    # Given two workers of one process each, with an I/O priority
    workdir = fresh("xfs_noreflink")
    (workdir / "source").mkdir()
    make_sparse_file(workdir / "source" / "disk.raw", _SIZE, _SIZE)
    env = {
        "FORKVM_RUNTIME_DIR": str(tmp_path / "runtime"),
        "FORKVM_COPY_RATE": str(_RATE),
        "FORKVM_IO_PRIORITY": "best-effort:6",
    }
    workers = [start_worker(workdir, env=env, concurrency=1) for _ in range(2)]

    # When both copy, and a local fork too
    began = time.monotonic()
    forks = [own_scheduler.send({"source": f"{workdir}/source", "destination": f"{workdir}/vm-{n}"}) for n in range(2)]
    local = run_forkvm("fork", workdir / "source", workdir / "vm-2", env=env, timeout=60)
    copied = [own_scheduler.wait(fork)["bytes"]["copied"] for fork in forks]
    seconds = time.monotonic() - began

    # Then
    assert local.returncode == 0, local.stderr
    assert copied == [_SIZE, _SIZE]
    assert 1.1 * _RATE * seconds >= 3 * _SIZE
    ionice = require_command("ionice", "the I/O priority of a process")
    children = [child for worker in workers for child in worker.children]
    priorities = {subprocess.check_output([ionice, "-p", str(child)], text=True) for child in children}
    assert len(children) == 2
    assert priorities == {"best-effort: prio 6\n"}
