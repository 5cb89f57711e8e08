"""A worker's process with few rights: what an ordinary user may do, and what the documented capabilities add."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.faults.rights import as_ordinary_user, documented_capabilities, worker_of_few_rights
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import PublicProgram
from tests.support.engine.child_processes import NOBODY
from tests.support.engine.forks import assert_alike
from tests.support.outcome import LOGS
from tests.support.sources import make_metadata
from tests.support.system.scheduler import Scheduler


@pytest.fixture
def source(fresh: Fresh) -> Path:
    """A source that only its owner, another user, can read, with all metadata that is preserved except `trusted.*`."""
    source = fresh("xfs") / "source"
    source.mkdir(mode=0o700)
    make_metadata(source)
    for path in [source, *source.rglob("*")]:
        status = path.lstat()
        if status.st_uid == 0:
            os.chown(path, 1234, 5678, follow_symlinks=False)
            if not path.is_symlink():
                path.chmod(status.st_mode & 0o7777)  # chown clears set-id bits
        if not path.is_symlink() and "trusted.snapshot" in os.listxattr(path):
            os.removexattr(path, "trusted.snapshot")
    return source


def test_a_worker_with_the_documented_capabilities_forks_foreign_files_and_preserves_their_owner(
    own_scheduler: Scheduler,
    public_program: PublicProgram,
    source: Path,
    mounts: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    log = tmp_path / "worker.log"
    request.node.stash[LOGS].append(log)
    env = {"FORKVM_INLINE_FILES": "0", "FORKVM_CHUNK_FILES": "5"}
    with worker_of_few_rights(own_scheduler.server, public_program, mounts, log, env) as worker:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        reflinked = own_scheduler.fork(source, source.parent / "reflinked")
        copied = own_scheduler.fork(source, source.parent / "copied", reflink="never")
        own_scheduler.wait_quiet()

    assert re.search(rf"^Uid:\s+{NOBODY}\s", status, re.MULTILINE)
    effective = re.search(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)
    assert effective is not None
    assert int(effective[1], 16).bit_count() == len(documented_capabilities().split(","))
    assert min(reflinked["chunks"], copied["chunks"]) > 1
    assert_alike(source, source.parent / "reflinked")
    assert_alike(source, source.parent / "copied")


def test_without_capabilities_foreign_files_are_not_accessible(public_program: PublicProgram, source: Path) -> None:
    done = subprocess.run(
        [*as_ordinary_user(""), *public_program.command, "fork", source, source.parent / "fork", "--json"],
        cwd=public_program.directory,
        env={"PATH": os.environ["PATH"], **public_program.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout, done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "permission_denied"
    assert [path.name for path in source.parent.iterdir()] == ["source"]
