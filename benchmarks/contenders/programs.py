"""The contenders: forkvm, other programs that copy trees, and the limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders.timed_process import READY

ENGINE, QUEUE, LIMIT, CP = "engine", "queue", "limit", "cp"
RSYNC, COPYTREE, XARGS = "rsync", "copytree", "xargs"
#: The other programs besides cp.
PEERS = (RSYNC, COPYTREE, XARGS)

_PROJECT = Path(__file__).resolve().parents[2]


class ContenderFailed(Exception):
    """A contender did not make its copy. The message says why."""


@dataclass(frozen=True)
class Run:
    """Start and end of one run, in seconds of CLOCK_MONOTONIC, which all processes share."""

    began: float
    ended: float
    #: Largest resident memory of any of its processes, in bytes; None if it was not measured.
    memory: int | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Contender:
    """Something that copies a directory tree."""

    name: str
    #: Copies the source to a destination that does not exist, and times itself. Raises ContenderFailed.
    run: Callable[[Path, Path], Run]


def engine() -> Contender:
    """forkvm without Redis: the function behind `forkvm fork`, with two processes."""
    return Contender(ENGINE, lambda source, destination: in_child("engine", source, destination))


def limit(reflink: bool) -> Contender:
    """Bare loops in two processes: the least that a Python program needs."""
    job = "clone-limit" if reflink else "copy-limit"
    return Contender(LIMIT, lambda source, destination: in_child(job, source, destination))


def cp(reflink: bool) -> Contender:
    """The program that targets are relative to."""
    return Contender(
        CP, lambda source, destination: _command("cp", "-a", _cp_option(reflink), str(source), str(destination))
    )


def peer(name: str, reflink: bool) -> Contender | None:
    """One of PEERS, or None if it is not installed."""
    if name == COPYTREE:
        return Contender(COPYTREE, lambda source, destination: in_child("copytree", source, destination))
    if shutil.which(name) is None:
        return None
    if name == RSYNC:
        return Contender(RSYNC, lambda source, destination: _command("rsync", "-aS", f"{source}/", f"{destination}/"))
    return Contender(XARGS, lambda source, destination: _xargs_cp(source, destination, _cp_option(reflink)))


def in_child(job: str, source: Path, destination: Path) -> Run:
    """Run a job of `timed_process.JOBS` in a fresh process, whose start and imports are not timed."""
    command = [sys.executable, "-m", "benchmarks.contenders.timed_process", job]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=_PROJECT) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stderr is not None
            if child.stdout.readline().strip() != READY:
                raise ContenderFailed(f"{job} did not start: {last_lines(child.stderr.read())}")
            child.stdin.write(json.dumps({"source": str(source), "destination": str(destination)}) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                raise ContenderFailed(f"{job}: {last_lines(child.stderr.read())}")
            return Run(**json.loads(answer))
        except BaseException:
            child.kill()
            raise


def _cp_option(reflink: bool) -> str:
    return "--reflink=always" if reflink else "--sparse=auto"


def _xargs_cp(source: Path, destination: Path, option: str) -> Run:
    """One cp for each entry of the top directory, two at a time."""
    began = time.perf_counter()
    destination.mkdir()
    names = b"".join(os.fsencode(name) + b"\0" for name in os.listdir(source))
    command = ["xargs", "-0", "-P2", "-n1", "cp", "-a", option, "-t", str(destination), "--"]
    done = subprocess.run(command, input=names, cwd=source, stderr=subprocess.PIPE, check=False)
    ended = time.perf_counter()
    return _checked(done, began, ended)


def _command(*command: str) -> Run:
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    return _checked(done, began, time.perf_counter())


def _checked(done: subprocess.CompletedProcess[bytes], began: float, ended: float) -> Run:
    if done.returncode:
        raise ContenderFailed(f"{done.args[0]}: {last_lines(done.stderr.decode(errors='replace'))}")
    return Run(began, ended)


def last_lines(text: str, count: int = 3) -> str:
    """The last lines of a program's output; cp prints one for each file that it could not copy."""
    return "\n".join(text.strip().splitlines()[-count:])
