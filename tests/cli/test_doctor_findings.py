"""`forkvm doctor`: pairs of roots, mounts, rights, Redis, settings; and findings that keep a worker from starting."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.kernel import xfs as kernel_xfs
from tasks.store.results import Results
from tests.cli.test_doctor import found_in
from tests.fixtures.filesystems import Fresh, Kind
from tests.fixtures.processes import RunForkvm, StartWorker, forkvm_script, program_environment
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.secure_redis import SecureRedis, documented_acl
from tests.support.requirements import require, require_command
from worker.checks.check import Check
from worker.checks.filesystem import filesystem_checks
from worker.checks.io_scheduler import priority_checks
from worker.checks.process import owner_check
from worker.checks.redis import redis_checks, server_checks
from worker.checks.redis_rights import COMMANDS
from worker.checks.reflink_pairs import pair_checks
from worker.checks.settings import settings_checks, variable_checks
from worker.checks.startup import check_redis
from worker.settings import Settings
from worker.started_processes import redis_executable

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


def test_a_redis_cluster_is_bad() -> None:
    executable = require(redis_executable(), "redis-server", "the tests that run on Redis")
    with tempfile.TemporaryDirectory(prefix="forkvm-redis-") as directory:
        server = RedisServer(executable, Path(directory), ("--cluster-enabled", "yes"))
        server.start()
        try:
            with server.client() as client:
                (mode,) = (check for check in server_checks("Redis", client) if check.subject == "Redis: mode")
        finally:
            server.kill()

    assert (mode.verdict, mode.found.partition(":")[0]) == ("bad", "cluster")


@pytest.mark.parametrize(
    ("settings", "subject", "found"),
    [
        (Settings(roots=("/a", "/a/b")), "FORKVM_ROOTS", "/a/b is inside /a, which includes it"),
        (Settings(roots=("/a", "/a")), "FORKVM_ROOTS", "/a is in it twice"),
        (Settings(redis_ca="/ca.pem"), "FORKVM_REDIS_CA", "without effect: no URL of Redis begins with rediss://"),
        (Settings(sentinel_master="m"), "FORKVM_SENTINEL_MASTER", "without effect: "),
        (Settings(broker_url="redis://:a@h", redis_password="b"), "FORKVM_REDIS_PASSWORD", "without effect: the URLs"),
        (Settings(concurrency=1_000_000), "FORKVM_CONCURRENCY", "1000000 pool processes for "),
        (Settings(visibility_timeout=60, task_time_limit=30), "FORKVM_VISIBILITY_TIMEOUT", "60 s, longer than a task"),
        (Settings(visibility_timeout=60, result_expires=60), "FORKVM_RESULT_EXPIRES", "60 s, not longer than FORKVM_V"),
        (
            Settings(copy_rate=1 << 16, concurrency=4, runtime_dir="/tmp/forkvm-none"),
            "FORKVM_COPY_RATE",
            "a chunk takes up to 16384 s, and is ended",
        ),
        (
            Settings(runtime_dir="/missing/forkvm"),
            "FORKVM_RUNTIME_DIR",
            "/missing/forkvm cannot be used: /missing does",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_warnings(settings: Settings, subject: str, found: str) -> None:
    (check,) = settings_checks(settings)

    assert (check.subject, check.verdict) == (f"setting {subject}", "warn")
    assert check.found.startswith(found)


def test_settings_that_fit_have_no_finding(tmp_path: Path) -> None:
    fit = Settings(
        broker_url="rediss://h",
        redis_ca="/ca.pem",
        redis_password="a",
        roots=("/a", "/b"),
        concurrency=1,
        copy_rate=1 << 20,
        runtime_dir=str(tmp_path / "new"),
        heartbeat_file=str(tmp_path / "heartbeat"),
        io_priority="idle",
    )

    assert list(settings_checks(fit)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_directory_that_cannot_be_used_is_a_warning_with_its_effect(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    pace = Settings(runtime_dir=str(tmp_path / "run"), copy_rate=1 << 30)
    pace.copy_pace.set(1 << 20)

    def found(**settings: Any) -> str:
        (check,) = settings_checks(Settings(concurrency=1, **settings))
        assert check.verdict == "warn"
        return check.found

    unused = found(runtime_dir=str(tmp_path / "file"))
    alone = found(runtime_dir=str(tmp_path / "file"), copy_rate=1 << 30)
    (replaced,) = settings_checks(pace)

    assert unused == f"{tmp_path}/file cannot be used: Not a directory; forkvm copy-rate has no effect"
    assert alone == f"{tmp_path}/file cannot be used: Not a directory; each process has FORKVM_COPY_RATE for itself"
    assert replaced.found == "replaced at run time by 1048576"


def test_a_heartbeat_file_that_a_worker_cannot_write_is_bad_for_doctor_too(
    run_forkvm: RunForkvm, tmp_path: Path, fresh: Fresh
) -> None:
    workdir = fresh("xfs")
    workdir.chmod(0o755)
    environment = {"FORKVM_BROKER_URL": f"redis+socket://{tmp_path}/nobody"}

    def found(path: str, user: int | None = None) -> dict[str, Any]:
        done = run_forkvm("doctor", "--json", env=environment | {"FORKVM_HEARTBEAT_FILE": path}, user=user)
        return found_in(done).get("setting FORKVM_HEARTBEAT_FILE", {"verdict": "ok", "found": ""})

    missing = found(f"{tmp_path}/missing/heartbeat")
    refused = found(f"{workdir}/heartbeat", _NOBODY)

    assert missing["verdict"] == refused["verdict"] == "bad"
    assert f"{tmp_path}/missing does not exist; a worker does not start" in missing["found"]
    assert f"{workdir} is not writable; a worker does not start" in refused["found"]
    assert found(f"{workdir}/heartbeat")["verdict"] == "ok"
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("scheduler", "ignored"),
    [
        ("none", ["idle", "best-effort:0"]),
        ("mq-deadline", ["best-effort:0"]),
        ("kyber", ["idle", "best-effort:0"]),
        ("bfq", []),
    ],
)
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_an_io_priority_that_the_disk_s_scheduler_ignores_is_a_warning(
    kind: Kind, scheduler: str, ignored: list[str], fresh: Fresh
) -> None:
    workdir = fresh(kind)
    mount = subprocess.run(["findmnt", "-no", "SOURCE", "-T", workdir], capture_output=True, text=True, check=True)
    disk = Path(mount.stdout.strip().partition("[")[0]).name
    switch = Path(f"/sys/block/{disk}/queue/scheduler")
    before = switch.read_text().partition("[")[2].partition("]")[0]
    require(scheduler in switch.read_text(), f"the I/O scheduler {scheduler}", "the check of I/O priorities")
    switch.write_text(scheduler)
    try:
        found = {
            priority: list(priority_checks(priority, (str(workdir), "/proc", "/missing")))
            for priority in ("none", "idle", "best-effort:0")
        }
    finally:
        switch.write_text(before)

    assert [priority for priority, checks in found.items() if checks] == ignored
    for checks in found.values():
        for check in checks:
            assert f"has no effect in {workdir}: {disk} has {scheduler} as its I/O scheduler" in check.found


def test_owners_are_looked_for_some_levels_below_a_root(fresh: Fresh) -> None:
    workdir = fresh("xfs")
    vm = workdir / "customer" / "vm"
    (vm / "a/b/c").mkdir(parents=True)
    for path in (vm / "disk", vm / "a/b/c/too-deep"):
        path.touch()
        os.chown(path, 1000, 1000)
    (workdir / "link").symlink_to(vm)

    fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        check = owner_check("root", fd)
    finally:
        os.close(fd)

    assert check.found.startswith("1 of 6 entries that were looked at belong to other users (first uid 1000)")


def test_a_privileged_worker_without_cap_setfcap_is_warned(run_forkvm: RunForkvm, tmp_path: Path) -> None:
    setpriv = require_command("setpriv", "a process with fewer capabilities")
    environment = os.environ | {"FORKVM_BROKER_URL": f"redis+socket://{tmp_path}/nobody"}

    done = subprocess.run(
        [setpriv, "--bounding-set=-setfcap", "--inh-caps=-setfcap", forkvm_script(), "doctor", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )

    user = found_in(done)["user"]
    assert user["verdict"] == "warn"
    assert "without CAP_SETFCAP, forks lose file capabilities" in user["found"]


def test_a_worker_warns_of_a_clock_that_differs_from_that_of_redis(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    with redis_server.client(decode_responses=False) as client:
        results = Results(client, 3600, str)
        before = check_redis(Settings(broker_url=redis_server.broker_url), results)
        monkeypatch.setattr(time, "time", lambda: now() + 60)
        after = check_redis(Settings(broker_url=redis_server.broker_url), results)

    assert before == []
    (line,) = after
    assert "clock: 60.0 s behind this host's; synchronize both hosts by NTP" in line


def test_a_misspelled_variable_is_reported_with_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKVM_CONCURENCY", "2")

    (check,) = (check for check in variable_checks() if check.subject == "variable FORKVM_CONCURENCY")

    assert check.verdict == "warn"
    assert check.found == "is not a setting and is ignored; did you mean FORKVM_CONCURRENCY?"


def test_a_variable_that_replaces_a_secret_file_is_reported_without_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "forkvm_redis_password").write_text("one-secret\n")
    (tmp_path / "forkvm_domain").write_text("nvme-a")
    for name, value in (("SECRETS_DIR", str(tmp_path)), ("REDIS_PASSWORD", "another-secret"), ("DOMAIN", "nvme-a")):
        monkeypatch.setenv(f"FORKVM_{name}", value)

    (check,) = variable_checks()

    assert (check.subject, check.verdict) == ("variable FORKVM_REDIS_PASSWORD", "warn")
    assert "secret" not in check.found.replace("secret file", "")


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
