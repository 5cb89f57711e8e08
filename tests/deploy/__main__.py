"""Runs the image and docker-compose.yml in real containers: `make test-deploy`, as root.

It starts its own dockerd in its own namespaces, and needs no image and no image registry. Replacements for the base
images are built once from Debian packages and kept in ~/.cache/forkvm-test-deploy. Exit codes: 0 all checks succeeded,
1 some failed, 2 this machine lacks a requirement, 128 + N after signal N.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.deploy.daemon import Daemon, running_daemon
from tests.deploy.image import check_image, check_plain_run
from tests.deploy.manifests import check_manifests
from tests.deploy.report import Report
from tests.deploy.rights import check_ordinary_user, check_root
from tests.deploy.running import check_faults, check_forks, check_pool_size
from tests.deploy.service import check_service
from tests.deploy.stack import running_stack
from tests.deploy.standins import make_base_images
from tests.deploy.watching import check_watching
from tests.fixtures.processes import ROOT

#: Required commands; scripts/setup.sh has the Debian package of each.
_COMMANDS = (
    *("dockerd", "docker", "docker-compose", "debootstrap", "iptables", "tini", "git"),
    *("unshare", "nsenter", "setpriv", "mkfs.ext4", "mkfs.xfs", "ip"),
)


def main() -> int:
    """Run all checks. Everything that was started is stopped at the end, also after a failure or a signal."""
    if missing := _missing():
        print(f"test-deploy: this machine lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    report = Report()
    begin = time.monotonic()
    check_manifests(report)
    with running_daemon() as daemon:
        _say("preparing replacements for the base images")
        make_base_images(daemon)
        _run_checks(daemon, report)
    _say(f"{report.passed} succeeded, {report.failed} failed, {time.monotonic() - begin:.0f} s")
    return 1 if report.failed else 0


def _run_checks(daemon: Daemon, report: Report) -> None:
    clone = _fresh_clone(daemon)
    with contextlib.ExitStack() as up:
        with report.check("compose builds the image and starts from a fresh clone with no variable set"):
            stack = up.enter_context(running_stack(daemon, clone))
        if report.failed:
            return
        check_image(daemon, stack, report)
        check_forks(stack, report)
        check_pool_size(daemon, stack, report)
        check_faults(daemon, stack, report)
        check_plain_run(daemon, stack, report)
        check_service(daemon, stack, report)
        check_watching(daemon, stack, report)
    check_ordinary_user(daemon, clone, report)
    check_root(daemon, clone, report)


def _fresh_clone(daemon: Daemon) -> Path:
    """A clone of the last commit, without uncommitted changes."""
    clone = daemon.directory / "clone"
    git = ["git", "-c", f"safe.directory={ROOT}"]
    changed = subprocess.run(
        [*git, "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        _say("changes that are not committed are not in the clone, and not checked")
    subprocess.run([*git, "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    return clone


def _missing() -> list[str]:
    missing = [] if os.geteuid() == 0 else ["root's rights"]
    return missing + [name for name in _COMMANDS if shutil.which(name) is None]


def _end(number: int, _: Any) -> None:
    """Stop the test with clean-up. Further signals do not interrupt the clean-up."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    _say(f"ended by {signal.Signals(number).name}; cleaning up")
    sys.exit(128 + number)


def _say(text: str) -> None:
    print(f"test-deploy: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
