"""The systemd unit under a real systemd, which runs as PID 1 of a container."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from tests.deploy.daemon import Daemon
from tests.deploy.report import Report
from tests.deploy.rights import BITS, give_to_others, made_guests, rights_of
from tests.deploy.stack import Container, Stack, wait_for
from tests.deploy.standins import make_systemd_image
from tests.fixtures.processes import ROOT

_NAME = "forkvm-worker@rack-7"
_UNIT = ROOT / "deploy/systemd/forkvm-worker@.service"
#: What systemd needs as PID 1. docker's --privileged would add all capabilities, and this machine itself may lack some.
_CAPABILITIES = (
    *("SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE", "SYS_NICE", "SYS_BOOT", "SETPCAP", "SETUID", "SETGID", "KILL"),
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "SETFCAP", "MKNOD", "NET_ADMIN", "AUDIT_WRITE"),
)

# The image's virtual environment uses the Python of the base image. The settings are those in the unit's comments.
_DOCKERFILE = """\
FROM {systemd}
COPY --from={image} /opt/forkvm /opt/forkvm
COPY {unit} /etc/systemd/system/
RUN ln -s /usr/bin/python3.11 /usr/local/bin/python3 \\
    && useradd --system forkvm && mkdir /guests /etc/forkvm \\
    && printf 'FORKVM_ROOTS=/guests\\nFORKVM_BROKER_URL=redis://redis:6379/0\\n' >/etc/forkvm/rack-7.env \\
    && chmod 600 /etc/forkvm/rack-7.env && systemctl enable {name}
"""


def check_service(daemon: Daemon, stack: Stack, report: Report) -> None:
    """An instance of the unit for the domain rack-7, with the Redis of compose."""
    with report.check("the systemd unit runs with its rights only, and forks preserve owners and rights"):
        guests = made_guests(daemon, "service")
        give_to_others(guests / "a")
        container = _started(daemon, stack)
        wait_for(lambda: _status(container) is not None, "the unit's worker")
        status = _status(container) or {}
        (line,) = re.findall(r"^AmbientCapabilities=(.+)$", _UNIT.read_text(), re.MULTILINE)
        wanted = sum(1 << BITS[name.removeprefix("CAP_")] for name in line.split())
        for held in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
            assert int(status[held], 16) == wanted, (held, status[held])
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), status
        for fork, reflink in (("b", "always"), ("c", "never")):
            request = {"source": "/guests/a", "destination": f"/guests/{fork}", "reflink": reflink}
            stack.fork(f"service-{fork}", request, "forkvm.rack-7")
            assert rights_of(guests / fork) == rights_of(guests / "a"), fork

    with report.check("systemd starts the unit's worker again after it was killed, and stops it with exit code 0"):
        container.execute("systemctl", "kill", "--signal=KILL", "--kill-who=main", _NAME)
        request = {"source": "/guests/a", "destination": "/guests/d"}
        stack.fork("service-d", request, "forkvm.rack-7")
        assert _property(container, "NRestarts") == "1"
        container.execute("systemctl", "stop", _NAME)
        assert (_property(container, "Result"), _property(container, "ExecMainStatus")) == ("success", "0")
    daemon.docker("rm", "--force", "deploy-service", check=False)


def _started(daemon: Daemon, stack: Stack) -> Container:
    """A container with the unit enabled."""
    systemd = make_systemd_image(daemon)
    with tempfile.TemporaryDirectory(dir=daemon.directory) as context:
        shutil.copy(_UNIT, context)
        Path(context, "Dockerfile").write_text(
            _DOCKERFILE.format(systemd=systemd, image=stack.image, unit=_UNIT.name, name=_NAME)
        )
        daemon.docker("build", "--network", "none", "--tag", "deploy-service", context)
    rights = [option for name in _CAPABILITIES for option in ("--cap-add", name)]
    unconfined = ["--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"]
    mounts = ["--tmpfs", "/run", "--tmpfs", "/tmp", "--volume", f"{daemon.guests / 'service'}:/guests"]
    line = ["--detach", "--name", "deploy-service", "--network", stack.network, "--cgroupns", "private"]
    daemon.docker("run", *line, *rights, *unconfined, *mounts, "deploy-service", "/lib/systemd/systemd")
    return Container(daemon, "deploy-service")


def _status(container: Container) -> dict[str, str] | None:
    """The status fields of the unit's main process; None while it has none."""
    pid = _property(container, "MainPID")
    if pid in ("", "0"):
        return None
    lines = container.execute("cat", f"/proc/{pid}/status").splitlines()
    found = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found if found["Name"] == "forkvm" else None


def _property(container: Container, name: str) -> str:
    return container.execute("sh", "-c", f"systemctl show --property={name} --value {_NAME} || true").strip()
