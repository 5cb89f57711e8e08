"""The contents of the image, and how it runs without compose (`docker run`)."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator

from tests.deploy.daemon import Daemon
from tests.deploy.report import Report
from tests.deploy.stack import Container, Stack, wait_for

#: Files of the source, of builds and of pip, anywhere except in the replacement of the base image.
_FIND_SOURCES = (
    r"find / -xdev -path /opt/packages -prune -o \( -name pyproject.toml -o -name constraints.txt -o -name Dockerfile"
    r" -o -path /app -o -path /build -o -path /root/.cache -o -name '*.whl' -o -name '.git' \)"
    r" -not -path '/usr/*' -print"
)

#: A first file that takes long to copy, and a walk that takes long: the planner then has a child that copies meanwhile.
_MAKE_WIDE = """
import os
os.makedirs("/guests/wide")
with open("/guests/wide/0-disk", "wb") as file:
    for _ in range(512):
        file.write(os.urandom(1 << 20))
for part in range(100):
    os.mkdir(f"/guests/wide/{part}")
    for n in range(800):
        open(f"/guests/wide/{part}/{n}", "w").close()
"""

#: Sends SIGKILL to the pool process that has a child (PID 1 is the worker; its children are the pool). Prints the pid
#: of the child, which has ended or become an orphan. Runs in the container, since the child lives for only a second.
_KILL_A_PLANNER = """
import glob, os, time
end = time.monotonic() + 60
while time.monotonic() < end:
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            pid, rest = open(path).read().split(" (forkvm) ")
            parents[int(pid)] = int(rest.split()[1])
        except (OSError, ValueError):
            pass
    for pid, parent in parents.items():
        if parents.get(parent) in parents:
            os.kill(parent, 9)
            print(pid)
            raise SystemExit
raise SystemExit("no planner had a child")
"""

_SIGNAL = "import os, signal, sys; os.kill(int(sys.argv[1]), signal.Signals['SIG' + sys.argv[2]])"


def check_image(daemon: Daemon, stack: Stack, report: Report) -> None:
    """Check the image without compose."""
    with report.check("the image has an ordinary user, an init, a health check and labels"):
        (found,) = json.loads(daemon.docker("image", "inspect", stack.image))
        config = found["Config"]
        assert config["User"] == "10001:10001", config["User"]
        assert config["Entrypoint"][0] == "tini", config["Entrypoint"]
        assert "FORKVM_HEARTBEAT_FILE" in config["Healthcheck"]["Test"][-1], config["Healthcheck"]
        assert config["Labels"]["org.opencontainers.image.title"] == "forkvm", config["Labels"]

    with report.check("the image contains the installed wheel, and no sources, no pip cache, no /app"):
        run = ["run", "--rm", "--network", "none", "--user", "0", stack.image]
        found_sources = daemon.docker(*run, "sh", "-c", f"{_FIND_SOURCES} 2>/dev/null").split()
        assert found_sources == [], found_sources
        modules = daemon.docker(*run, "python", "-c", "import worker, tasks; print(worker.__file__, tasks.__file__)")
        assert all(re.search(r"^/opt/forkvm/lib/.*/site-packages/", path) for path in modules.split()), modules
        assert "forkvm, version" in daemon.docker(*run, "forkvm", "--version")


def check_plain_run(daemon: Daemon, stack: Stack, report: Report) -> None:
    """`docker run` with a read-only root and without any capability, in its own domain."""
    with (
        report.check("docker run, read-only, without capabilities and without docker's init: healthy, forks"),
        _running(daemon, stack) as container,
    ):
        container.wait_healthy()
        assert int(container.status()["CapEff"], 16) == 0
        assert [name for pid, _, _, name in container.processes() if pid == 1] == ["tini"]
        container.python(_MAKE_WIDE)
        stack.fork("plain", {"source": "/guests/wide", "destination": "/guests/plain"}, "forkvm.plain")

    with (
        report.check("pool processes killed while they plan leave no zombie, and the fork succeeds"),
        _running(daemon, stack) as container,
    ):
        container.wait_healthy()
        stack.send("killed", {"source": "/guests/wide", "destination": "/guests/killed"}, "forkvm.plain")
        orphan = container.python(_KILL_A_PLANNER).strip()
        result = stack.result("killed")
        assert result["files"]["copied"] == 80_001, result["files"]
        zombies = [process for process in container.processes() if process[2] == "Z"]
        assert zombies == [], (orphan, zombies)

    with (
        report.check("docker's health check fails while the worker hangs, and succeeds when it continues"),
        _running(daemon, stack) as container,
    ):
        container.wait_healthy()
        (worker,) = [pid for pid, parent, _, name in container.processes() if parent == 1 and name == "forkvm"]
        container.python(_SIGNAL, str(worker), "STOP")
        wait_for(lambda: container.health() == "unhealthy", "the container to be unhealthy")
        container.python(_SIGNAL, str(worker), "CONT")
        container.wait_healthy()

    with (
        report.check("docker stop ends an idle worker at once, with exit code 0"),
        _running(daemon, stack) as container,
    ):
        container.wait_healthy()
        begin = time.monotonic()
        daemon.docker("stop", "--time", "60", container.name)
        assert time.monotonic() - begin < 20
        assert container.inspect()["State"]["ExitCode"] == 0


@contextlib.contextmanager
def _running(daemon: Daemon, stack: Stack) -> Iterator[Container]:
    name = "deploy-plain"
    options = ["--read-only", "--tmpfs", "/run/forkvm:mode=1777", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
    environment = ["--env", "FORKVM_BROKER_URL=redis://redis:6379/0", "--env", "FORKVM_DOMAIN=plain"]
    line = ["--detach", "--name", name, "--network", stack.network, "--volume", f"{stack.volume}:/guests"]
    health = ["--health-interval", "1s", "--health-retries", "1"]
    daemon.docker("run", *line, *options, *environment, *health, stack.image)
    try:
        yield Container(daemon, name)
    finally:
        daemon.docker("rm", "--force", name)
