"""`forkvm doctor`: pairs of roots, mounts, rights, Redis, settings; and findings that keep a worker from starting."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tasks.copier.kernel import xfs as kernel_xfs
from tests.cli.test_doctor import found_in
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import RunForkvm, StartWorker, program_environment
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.secure_redis import SecureRedis, documented_acl
from tests.support.requirements import require_command
from worker.checks.check import Check
from worker.checks.filesystem import filesystem_checks
from worker.checks.process import owner_check
from worker.checks.redis import redis_checks
from worker.checks.redis_rights import COMMANDS
from worker.checks.reflink_pairs import pair_checks
from worker.checks.settings import settings_checks, variable_checks
from worker.settings import Settings

_NOBODY = 65534
#: Commands of SECURITY.md that the check of rights cannot try.
_NOT_TRIED = {"hello", "info", "multi", "exec", "watch", "unwatch"} | {
    f"{pattern}{way}subscribe" for pattern in ("", "p") for way in ("", "un")
}


def test_each_root_has_a_row_of_the_matrix_of_reflinks(fresh: Fresh) -> None:
    one, other, ext4 = fresh("xfs"), fresh("xfs"), fresh("ext4")

    checks = {check.subject: check for check in pair_checks((str(one), str(other), str(ext4), f"{one}/missing"))}

    assert set(checks) == {f"reflink from {root}" for root in (one, other, ext4)}
    row = checks[f"reflink from {one}"]
    assert row.verdict == "warn"
    assert row.found.startswith(f"to {other}: works; to {ext4}: refused (EXDEV: ")
    assert checks[f"reflink from {ext4}"].found.count("refused") == 2
    assert [check.verdict for check in pair_checks((str(one), str(other)))] == ["ok", "ok"]
    assert list(pair_checks((str(one),))) == []
    assert [path for root in (one, other, ext4) for path in root.iterdir()] == []


def test_the_geometry_of_xfs_is_what_xfs_info_says(xfs: Path, xfs_noreflink: Path) -> None:
    for workdir in (xfs, xfs_noreflink):
        command = [require_command("xfs_info", "XFS"), str(workdir)]
        info = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        block, blocks = re.findall(r"^log .*?bsize=(\d+) +blocks=(\d+)", info, re.MULTILINE)[0]
        fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
        found = kernel_xfs.geometry(fd)
        os.close(fd)

        assert found.log_bytes == int(block) * int(blocks)
        assert found.has_reflink == ("reflink=1" in info)
        assert found.has_exchange == ("exchange=1" in info)


def test_a_mount_is_shown_with_its_options_and_sync_is_a_warning(fresh: Fresh, tmp_path: Path) -> None:
    def mount_check(path: Path) -> Check:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return next(check for check in filesystem_checks("root", fd) if check.subject == "root: mount")
        finally:
            os.close(fd)

    plain = mount_check(fresh("xfs"))
    (tmp_path / "slow").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "sync", "tmpfs", str(tmp_path / "slow")], check=True)
    try:
        slow = mount_check(tmp_path / "slow")
    finally:
        subprocess.run(["umount", str(tmp_path / "slow")], check=True)

    assert plain.verdict == "ok"
    assert plain.found.startswith("xfs at /")
    assert (slow.verdict, f"tmpfs at {tmp_path}/slow (" in slow.found) == ("warn", True)
    assert "sync: each write waits for the disk" in slow.found


def test_a_user_who_may_not_preserve_the_owners_of_a_root_is_warned(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    workdir.chmod(0o777)
    (workdir / "vm").mkdir()
    roots = {"FORKVM_ROOTS": str(workdir), "FORKVM_BROKER_URL": f"redis+socket://{workdir}/nobody"}

    fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    as_root = owner_check("root", fd)
    os.close(fd)
    as_nobody = found_in(run_forkvm("doctor", "--json", env=roots, user=_NOBODY))

    assert as_root.verdict == "ok"
    owners = as_nobody[f"root {workdir}: owners"]
    assert owners["verdict"] == "warn"
    assert owners["found"].startswith("1 of 1 entries belong to other users (first uid 0): their forks lose owners")
    assert "CAP_CHOWN" in owners["fix"]
    assert as_nobody["user"]["found"] == f"uid {_NOBODY}, no capability"


def test_the_checked_rights_are_those_of_security_md() -> None:
    documented = {word[1:] for word in documented_acl("-") if word.startswith("+")}

    assert {command.lower() for command in COMMANDS} == documented - _NOT_TRIED


def test_missing_redis_rights_are_named_and_the_check_writes_nothing(secure_redis: SecureRedis) -> None:
    settings = Settings(broker_url=secure_redis.url(), redis_ca=str(secure_redis.ca))

    def rights() -> Check:
        (found,) = (check for check in redis_checks(settings) if check.subject.endswith(": rights"))
        return found

    documented = rights()
    with secure_redis.admin() as admin:
        keys = admin.keys()
        admin.execute_command("ACL", "SETUSER", "forkvm", "-zadd", "-brpop", "resetkeys", "~forkvm*")
    reduced = rights()

    assert documented.verdict == "ok"
    assert keys == []
    assert reduced.verdict == "bad"
    refused = set(reduced.found.partition(": ")[2].split(", "))
    assert {"ZADD", "BRPOP", "GET celery-task-meta-forkvm-doctor", "SADD _kombu.binding.forkvm"} <= refused
    assert not {"ZREM", "LPUSH", "HSET"} & refused
    assert "SECURITY.md" in reduced.fix


def test_a_replica_a_failed_disk_write_and_another_clock_are_found(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(broker_url=redis_server.broker_url)

    def checks() -> dict[str, Check]:
        return {check.subject.rpartition(": ")[2]: check for check in redis_checks(settings)}

    before = checks()
    with redis_server.client() as client:
        client.replicaof("127.0.0.1", 1)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 60)
        after = checks()
        client.replicaof("NO", "ONE")

    assert {before[name].verdict for name in ("role", "persistence", "clock", "latency", "rights")} == {"ok"}
    assert (after["role"].verdict, after["role"].found[:5]) == ("bad", "slave")
    assert after["clock"].verdict == "warn"
    assert after["clock"].found.startswith("60.")
    assert "behind this host's" in after["clock"].found


@pytest.mark.parametrize(
    ("settings", "subject", "found"),
    [
        (Settings(roots=("/a", "/a/b")), "FORKVM_ROOTS", "/a/b is inside /a, which includes it"),
        (Settings(roots=("/a", "/a")), "FORKVM_ROOTS", "/a is in it twice"),
        (Settings(redis_ca="/ca.pem"), "FORKVM_REDIS_CA", "without effect: no URL of Redis begins with rediss://"),
        (Settings(sentinel_master="m"), "FORKVM_SENTINEL_MASTER", "without effect: "),
        (Settings(broker_url="redis://:a@h", redis_password="b"), "FORKVM_REDIS_PASSWORD", "without effect: the URLs"),
        (Settings(concurrency=1_000_000), "FORKVM_CONCURRENCY", "1000000 pool processes for "),
    ],
)
def test_settings_that_contradict_each_other_are_warnings(settings: Settings, subject: str, found: str) -> None:
    (check,) = settings_checks(settings)

    assert (check.subject, check.verdict) == (f"setting {subject}", "warn")
    assert check.found.startswith(found)


def test_settings_that_fit_have_no_finding() -> None:
    fit = Settings(broker_url="rediss://h", redis_ca="/ca.pem", redis_password="a", roots=("/a", "/b"), concurrency=1)

    assert list(settings_checks(fit)) == []


def test_a_misspelled_variable_is_reported_with_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKVM_CONCURENCY", "2")

    (check,) = (check for check in variable_checks() if check.subject == "variable FORKVM_CONCURENCY")

    assert check.verdict == "warn"
    assert check.found == "is not a setting and is ignored; did you mean FORKVM_CONCURRENCY?"


def test_a_worker_logs_each_warning_and_does_not_start_where_no_fork_can_succeed(
    start_worker: StartWorker, fresh: Fresh, run_forkvm: RunForkvm, redis_server: RedisServer
) -> None:
    workdir = fresh("xfs")
    missing = f"{workdir}/missing"

    worker = start_worker([workdir, Path(missing)])
    refused = run_forkvm("worker", env=program_environment(redis_server, Path(missing)))

    (line,) = (line for line in worker.output().splitlines() if f"root {missing}: it does not exist" in line)
    assert "WARNING" in line
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"forkvm: root {missing}: it does not exist; create or mount it")
    assert refused.stderr.count("\n") == 1
