"""A worker with exactly the rights that SECURITY.md lists."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.fixtures.processes import ROOT, PublicProgram, Worker, program_environment
from tests.fixtures.redis_server import RedisServer
from tests.support.engine.child_processes import NOBODY
from tests.support.requirements import require_command
from tests.support.system.systems import SMALL_LIMITS


def documented_capabilities() -> str:
    """The capabilities in the systemd unit that SECURITY.md refers to, in the format of setpriv."""
    unit = (ROOT / "deploy" / "systemd" / "forkvm-worker@.service").read_text()
    found = re.search(r"^AmbientCapabilities=(.*)$", unit, re.MULTILINE)
    assert found is not None
    return ",".join("+" + name.removeprefix("CAP_").lower() for name in found[1].split())


def as_ordinary_user(capabilities: str) -> list[str]:
    """The start of a command line: as nobody, in no group, with these capabilities and no way to get more."""
    setpriv = require_command("setpriv", "a process with few rights")
    who = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    keep = f"-all,{capabilities}" if capabilities else "-all"
    return [setpriv, *who, f"--inh-caps={keep}", f"--ambient-caps={keep}", f"--bounding-set={keep}"]


@contextmanager
def worker_of_few_rights(
    server: RedisServer, program: PublicProgram, roots: Path, log: Path, env: Mapping[str, str]
) -> Iterator[Worker]:
    """A worker as nobody, with the documented capabilities and NoNewPrivileges, which takes tasks."""
    environment = program_environment(server, roots) | SMALL_LIMITS | program.environment | dict(env)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*as_ordinary_user(documented_capabilities()), *program.command, "worker", "--concurrency", "2"],
            cwd=program.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    worker = Worker(process, log)
    try:
        worker.wait_until_ready()
        yield worker
    finally:
        worker.end()
