"""The containers of a check: a compose project of the clone, or a single container of `docker run`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.deploy.daemon import Daemon
from tests.deploy.standins import CLIENT
from tests.fixtures.processes import ROOT

_CLIENT_PROGRAM = (ROOT / "tests/deploy/client.py").read_text()
#: Seconds for a service to become healthy and for a job to end, also on a busy machine.
_TIMEOUT = 300.0

#: Prints [pid, parent, state, name] of each process of a container.
_PROCESSES = """
import glob, json
found = []
for path in glob.glob("/proc/[0-9]*/stat"):
    try:
        pid, rest = open(path).read().split(" (", 1)
    except OSError:
        continue
    name, rest = rest.rsplit(") ", 1)
    state, parent = rest.split()[:2]
    found.append([int(pid), int(parent), state, name])
print(json.dumps(found))
"""


class Container:
    """One container, by its name or id."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon = daemon
        self.name = name

    def inspect(self) -> dict[str, Any]:
        """The output of `docker inspect`."""
        found: list[dict[str, Any]] = json.loads(self._daemon.docker("inspect", self.name))
        return found[0]

    def execute(self, *command: str, stdin: str | None = None, user: str | None = None) -> str:
        """The output of a command in the container; CommandFailed if it fails."""
        options = ["--interactive", *(["--user", user] if user else [])]
        return self._daemon.docker("exec", *options, self.name, *command, stdin=stdin)

    def python(self, program: str, *arguments: str, user: str | None = None) -> str:
        """The output of a program that the image's Python runs in the container."""
        return self.execute("python", "-", *arguments, stdin=program, user=user)

    def processes(self) -> list[tuple[int, int, str, str]]:
        """(pid, parent, state, name) of each process, with the pids of the container's namespace."""
        return [(pid, parent, state, name) for pid, parent, state, name in json.loads(self.python(_PROCESSES))]

    def status(self) -> dict[str, str]:
        """The fields of the status of PID 1, as in proc_pid_status(5)."""
        lines = self.execute("cat", "/proc/1/status").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def kill(self) -> None:
        """Simulate a crash: SIGKILL to the container's first process. docker restarts it by its restart policy."""
        self._daemon.kill(str(self.inspect()["State"]["Pid"]))

    def health(self) -> str:
        """The state of docker's health check: starting, healthy or unhealthy."""
        return str(self.inspect()["State"]["Health"]["Status"])

    def wait_healthy(self) -> None:
        """Return when the container's health check succeeds."""
        try:
            wait_for(lambda: self.health() == "healthy", f"{self.name} to be healthy")
        except AssertionError as error:
            log = self._daemon.docker("logs", "--tail", "40", self.name)
            raise AssertionError(f"{error}; its log:\n{log}") from None

    def wait_restarted(self, restarts: int) -> None:
        """Return when docker has restarted the container more than `restarts` times."""

        def again() -> bool:
            found = self.inspect()
            return bool(found["RestartCount"] > restarts and found["State"]["Running"])

        wait_for(again, f"{self.name} to be started again")


class Stack:
    """A compose project of the clone, with the given variables."""

    def __init__(
        self, daemon: Daemon, clone: Path, variables: Mapping[str, str], override: Mapping[str, Any] | None
    ) -> None:
        self._daemon = daemon
        self._clone = clone
        self._variables = dict(variables) | {"COMPOSE_PROJECT_NAME": "deploy"}
        self._files = ["--file", "docker-compose.yml"]
        if override is not None:
            path = daemon.directory / "override.yml"
            path.write_text(json.dumps(override))  # JSON is YAML
            self._files += ["--file", str(path)]

    #: The names of the project's network, image and volume in compose.
    network, image, volume = "deploy_default", "deploy_worker", "deploy_guests"

    def compose(self, *arguments: str) -> str:
        """The output of `docker-compose ARGUMENTS` in the clone."""
        files = self._files if len(self._files) > 2 else []
        return self._daemon.run(["docker-compose", *files, *arguments], cwd=self._clone, environment=self._variables)

    def __getitem__(self, service: str) -> Container:
        return Container(self._daemon, self.compose("ps", "--quiet", service).strip())

    def client(self, *arguments: str) -> Any:
        """The output of a command of client.py, run in a container of its own on the project's network."""
        line = ["run", "--rm", "--interactive", "--network", self.network, CLIENT, "python", "-", *arguments]
        return json.loads(self._daemon.docker(*line, stdin=_CLIENT_PROGRAM))

    def send(self, job_id: str, request: Mapping[str, Any], queue: str = "forkvm") -> None:
        """Send a fork from a client."""
        self.client("send", "forkvm.fork", json.dumps(request), job_id, queue)

    def result(self, job_id: str) -> dict[str, Any]:
        """The result of a fork that succeeded; otherwise AssertionError with what the client received."""
        answer = self.client("get", job_id, str(_TIMEOUT))
        assert answer["state"] == "SUCCESS", answer
        result: dict[str, Any] = answer["result"]
        assert result["status"] == "succeeded", result
        return result

    def fork(self, job_id: str, request: Mapping[str, Any], queue: str = "forkvm") -> dict[str, Any]:
        """Send a fork from a client and return its result."""
        self.send(job_id, request, queue)
        return self.result(job_id)


@contextlib.contextmanager
def running_stack(
    daemon: Daemon, clone: Path, variables: Mapping[str, str] | None = None, override: Mapping[str, Any] | None = None
) -> Iterator[Stack]:
    """The project after `docker-compose up`, with both services healthy; removed with its volumes at the end."""
    stack = Stack(daemon, clone, variables or {}, override)
    try:
        stack.compose("up", "--detach", "--build")
        for service in ("redis", "worker"):
            stack[service].wait_healthy()
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = _TIMEOUT) -> None:
    """Return when `condition` holds; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
