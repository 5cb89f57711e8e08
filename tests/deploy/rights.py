"""docker-compose.yml with guests on an XFS of the host, with different users and capabilities."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.deploy.daemon import Daemon
from tests.deploy.report import Report
from tests.deploy.stack import running_stack
from tests.fixtures.processes import ROOT
from tests.support.guests import make_guest

#: Bits of the capability sets, see capabilities(7) and linux/capability.h.
BITS = {"CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "FSETID": 4, "SETFCAP": 31}
#: The owner of the guests in the check of an unprivileged user.
_OWNER = 1234
#: security.capability of a program with cap_net_raw+ep: version 2, effective; permitted and inheritable, twice.
_FILE_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def check_ordinary_user(daemon: Daemon, clone: Path, report: Report) -> None:
    """FORKVM_USER owns all guests, so no capability is needed."""
    guests = made_guests(daemon, "ordinary")
    for path in (guests, *guests.rglob("*")):
        os.lchown(path, _OWNER, _OWNER)
    variables = {
        "FORKVM_GUESTS": str(daemon.guests / "ordinary"),
        "FORKVM_USER": f"{_OWNER}:{_OWNER}",
        "FORKVM_NAME": "rack-7",
        "FORKVM_CONCURRENCY": "3",
    }
    with (
        report.check("compose with an XFS of the host, its owner, a name and a pool size: forks only by reflink"),
        running_stack(daemon, clone, variables) as stack,
    ):
        result = stack.fork("ordinary", {"source": "/guests/a", "destination": "/guests/b", "reflink": "always"})
        assert result["bytes"]["copied"] == 0, result["bytes"]
        assert result["files"]["reflinked"] == 6, result["files"]
        assert (guests / "b/overlay.raw").read_bytes() == (guests / "a/overlay.raw").read_bytes()
        assert {(path.lstat().st_uid, path.lstat().st_gid) for path in (guests / "b").rglob("*")} == {(_OWNER, _OWNER)}
        assert int(stack["worker"].status()["CapEff"], 16) == 0
        ((node, size),) = stack.client("pools").items()
        assert (node.partition("@")[0], size) == ("rack-7", 3)


def check_root(daemon: Daemon, clone: Path, report: Report) -> None:
    """FORKVM_USER=0:0 preserves all owners, with the capabilities of docker-compose.yml or of SECURITY.md."""
    (line,) = re.findall(r"^AmbientCapabilities=(.+)$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    six = sorted(name.removeprefix("CAP_") for name in line.split())
    added = sorted(set(BITS) - {"DAC_READ_SEARCH"})
    override = {"services": {"worker": {"cap_add": six}}}
    for name, capabilities, changed in (("compose", added, None), ("six", six, override)):
        with report.check(f"read-only as 0:0 with {', '.join(capabilities)} only: forks preserve owners and rights"):
            _check_root(daemon, clone, name, capabilities, changed)


def _check_root(
    daemon: Daemon, clone: Path, name: str, capabilities: list[str], override: Mapping[str, Any] | None
) -> None:
    guests = made_guests(daemon, name)
    source = guests / "a"
    give_to_others(source)
    variables = {"FORKVM_GUESTS": str(daemon.guests / name), "FORKVM_USER": "0:0"}
    with running_stack(daemon, clone, variables, override) as stack:
        status = stack["worker"].status()
        assert int(status["CapEff"], 16) == sum(1 << BITS[name] for name in capabilities), status["CapEff"]
        assert stack["worker"].inspect()["HostConfig"]["ReadonlyRootfs"]
        stack.fork("root", {"source": "/guests/a", "destination": "/guests/b"})
        stack.fork("root-copy", {"source": "/guests/a", "destination": "/guests/c", "reflink": "never"})
    for fork in ("b", "c"):
        assert rights_of(guests / fork) == rights_of(source), fork


def made_guests(daemon: Daemon, name: str) -> Path:
    """A directory of the XFS with the guest `a`, by its path in this process."""
    guests = daemon.guests_seen_here / name
    guests.mkdir()
    make_guest(guests / "a")
    return guests


def give_to_others(source: Path) -> None:
    """Set owners, modes and attributes so that each of the capabilities is needed."""
    os.setxattr(source / "config.json", "security.capability", _FILE_CAPABILITY)
    for number, path in enumerate(sorted(source.rglob("*"))):
        capability = os.getxattr(path, "security.capability") if path.name == "config.json" else None
        os.lchown(path, 2000 + number, 3000 + number)
        if capability:
            os.setxattr(path, "security.capability", capability)  # chown clears it
    os.chown(source, 2000, 3000)
    (source / "state").chmod(0o6755)
    (source / "metadata.json").chmod(0o000)
    (source / "snapshots").chmod(0o700)
    source.chmod(0o700)


def rights_of(top: Path) -> dict[str, tuple[int, int, int, bytes | None]]:
    """Owner, group, mode and file capability of each entry that a fork contains."""
    found = {}
    for path in (top, *top.rglob("*")):
        relative = str(path.relative_to(top))
        entry = path.lstat()
        if relative.startswith("logs") or relative.endswith(".lz4.tmp") or stat.S_ISSOCK(entry.st_mode):
            continue
        attributes = os.listxattr(path, follow_symlinks=False)
        capability = os.getxattr(path, "security.capability") if "security.capability" in attributes else None
        found[relative] = (entry.st_uid, entry.st_gid, entry.st_mode, capability)
    return found
