"""A worker's process with few rights: what an ordinary user may, and what the documented capabilities add to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.engine.children import NOBODY
from tests.engine.forking import assert_alike
from tests.engine.sources import make_metadata
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import ROOT, PublicProgram, Worker, program_environment
from tests.support.outcome import LOGS
from tests.support.requirements import require_command
from tests.system.running import SMALL_LIMITS
from tests.system.scheduler import Scheduler


def _documented_capabilities() -> str:
    """What SECURITY.md's unit asks for."""
    found = re.search(r"^AmbientCapabilities=(.*)$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert found is not None
    return ",".join("+" + name.removeprefix("CAP_").lower() for name in found[1].split())


def _as_ordinary_user(capabilities: str) -> list[str]:
    """A command's beginning: as nobody, in no group, with these capabilities and no way to more."""
    setpriv = require_command("setpriv", "a process with few rights")
    who = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    keep = f"-all,{capabilities}" if capabilities else "-all"
    return [setpriv, *who, f"--inh-caps={keep}", f"--ambient-caps={keep}", f"--bounding-set={keep}"]


@pytest.fixture
def source(fresh: Fresh) -> Path:
    """What another user owns and keeps to himself, with all metadata that is worth keeping but `trusted.*`."""
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


def test_a_worker_with_the_documented_capabilities_forks_what_others_own_and_keeps_it_theirs(
    own_scheduler: Scheduler,
    public_program: PublicProgram,
    source: Path,
    mounts: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    capabilities = _documented_capabilities()
    environment = program_environment(own_scheduler.server, mounts) | SMALL_LIMITS | public_program.environment
    log = tmp_path / "worker.log"
    request.node.stash[LOGS].append(log)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_as_ordinary_user(capabilities), *public_program.command, "worker", "--concurrency", "2"],
            cwd=public_program.directory,
            env=environment | {"FORKVM_INLINE_FILES": "0", "FORKVM_CHUNK_FILES": "5"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    worker = Worker(process, log)
    try:
        worker.wait_until_ready()
        status = Path(f"/proc/{worker.pid}/status").read_text()
        reflinked = own_scheduler.fork(source, source.parent / "reflinked")
        copied = own_scheduler.fork(source, source.parent / "copied", reflink="never")
        own_scheduler.wait_quiet()
    finally:
        worker.end()

    assert re.search(rf"^Uid:\s+{NOBODY}\s", status, re.MULTILINE)
    effective = re.search(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)
    assert effective is not None
    assert int(effective[1], 16).bit_count() == len(capabilities.split(","))
    assert min(reflinked["chunks"], copied["chunks"]) > 1
    assert_alike(source, source.parent / "reflinked")
    assert_alike(source, source.parent / "copied")


def test_without_them_what_others_own_is_out_of_reach(public_program: PublicProgram, source: Path) -> None:
    done = subprocess.run(
        [*_as_ordinary_user(""), *public_program.command, "fork", source, source.parent / "fork", "--json"],
        cwd=public_program.directory,
        env={"PATH": os.environ["PATH"], **public_program.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert json.loads(done.stdout)["error"]["code"] == "permission_denied"
    assert [path.name for path in source.parent.iterdir()] == ["source"]
