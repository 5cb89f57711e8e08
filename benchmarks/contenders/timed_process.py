"""Runs one function in a fresh process and times it, without the start of Python and its imports.

    python -m benchmarks.contenders.timed_process engine|copytree|clone-limit|copy-limit

It prints `ready`, reads one line of JSON `{"source", "destination"}`, calls the function and prints one line of JSON
`{"began", "ended", "memory"}`: seconds of CLOCK_MONOTONIC, and the largest resident memory of this process or any
child, in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders.bare_loops import clone_tree, copy_tree
from tasks.copier.fork.local import fork_here
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tasks.copier.roots import Roots

#: `forkvm fork` uses this number on two cores.
_PROCESSES = 2

#: Printed when everything is imported.
READY = "ready"


def _never_stop(progress: Progress) -> None:
    """Never stop the copy; progress is not shown."""


def _engine(source: str, destination: str) -> None:
    """The function of `forkvm fork`."""
    spec = ForkSpec(fork_id=f"bench-{os.getpid()}", source=source, destination=destination)
    result = fork_here(spec, Roots(), Limits(), _PROCESSES, _never_stop)
    if result["status"] != "succeeded":
        sys.exit(f"the fork failed: {result['error']}")


def _copytree(source: str, destination: str) -> None:
    shutil.copytree(source, destination, symlinks=True)


JOBS: dict[str, Callable[[str, str], None]] = {
    "engine": _engine,
    "copytree": _copytree,
    "clone-limit": clone_tree,
    "copy-limit": copy_tree,
}


def _largest_memory() -> int:
    """Bytes. VmHWM for this process, since ru_maxrss is inherited from the parent across execve."""
    status = Path("/proc/self/status").read_text()
    own = int(status.partition("VmHWM:")[2].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) << 10


def _main() -> None:
    job = JOBS[sys.argv[1]]
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line:
        return
    request = json.loads(line)
    source, destination = request["source"], request["destination"]
    began = time.perf_counter()
    job(source, destination)
    ended = time.perf_counter()
    print(json.dumps({"began": began, "ended": ended, "memory": _largest_memory()}), flush=True)


if __name__ == "__main__":
    _main()
