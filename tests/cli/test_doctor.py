"""`forkvm doctor`: its findings on real filesystems and a real Redis. It leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh, bind_mounted
from tests.fixtures.fuse import Passthrough
from tests.fixtures.processes import RunForkvm, program_environment
from tests.fixtures.redis_server import RedisServer
from tests.fixtures.secure_redis import SecureRedis

_NOBODY = 65534


@pytest.fixture
def no_redis(tmp_path: Path) -> dict[str, str]:
    """An environment without a Redis."""
    return {"FORKVM_BROKER_URL": f"redis+socket://{tmp_path}/nobody?password=secret"}


def found_in(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The checks of a JSON document by subject."""
    assert "Traceback" not in done.stderr
    return {check["subject"]: check for check in json.loads(done.stdout)["checks"]}


def test_no_problem_is_found_on_xfs_with_a_well_configured_redis(
    run_forkvm: RunForkvm, fresh: Fresh, redis_server: RedisServer
) -> None:
    workdir = fresh("xfs")

    done = run_forkvm("doctor", "--json", env=program_environment(redis_server, workdir))

    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(document) == {"verdict", "checks"}
    # The running kernel may be one with a known bug.
    assert {check["verdict"] for check in document["checks"] if "copy-on-write" not in check["subject"]} == {"ok"}
    assert all(set(check) == {"subject", "verdict", "found", "fix"} for check in document["checks"])
    checks = found_in(done)
    redis = f"Redis {redis_server.broker_url}"
    assert {"kernel: openat2", "kernel: renameat2", "limit: open files", f"{redis}: memory"} <= set(checks)
    assert checks[f"root {workdir}"]["found"].startswith("XFS, writable")
    assert checks[f"root {workdir}: reflink"]["found"] == "works"
    assert checks[f"root {workdir}: read leases"]["found"] == "work"
    assert checks[redis]["found"] == "reached through a unix socket"
    assert checks[f"{redis}: appendonly"]["found"] == "yes"
    assert checks[f"{redis}: maxmemory-policy"]["found"] == "noeviction"
    assert list(workdir.iterdir()) == []


def test_text_output_has_a_line_per_check_and_the_fix_below(
    run_forkvm: RunForkvm, fresh: Fresh, redis_server: RedisServer
) -> None:
    workdir = fresh("ext4")

    done = run_forkvm("doctor", env=program_environment(redis_server, workdir))

    lines = done.stdout.splitlines()
    warned = next(n for n, line in enumerate(lines) if line.startswith("warn"))
    assert (done.returncode, done.stderr) == (0, "")  # a warning is not a failure
    assert {line[:5] for line in lines} == {"ok   ", "warn ", "     "}
    assert lines[warned].startswith(f"warn root {workdir}: reflink: refused (EOPNOTSUPP")
    assert "forks copy all data" in lines[warned]
    assert lines[warned + 1].startswith("     -> keep guests on XFS")
    assert [line for line in lines if line.startswith("     ")] == [lines[warned + 1]]
    assert list(workdir.iterdir()) == []


def test_unusable_roots_are_bad_and_without_redis_the_exit_code_is_3(
    run_forkvm: RunForkvm, tmp_path: Path, no_redis: dict[str, str], redis_server: RedisServer
) -> None:
    (tmp_path / "file").write_bytes(b"")
    roots = {"FORKVM_ROOTS": f"{tmp_path}/missing:{tmp_path}/file"}

    with_redis = run_forkvm("doctor", "--json", env=program_environment(redis_server) | roots)
    without = run_forkvm("doctor", "--json", env=no_redis | roots)
    as_text = run_forkvm("doctor", env=no_redis)

    assert (with_redis.returncode, without.returncode, as_text.returncode) == (1, 3, 3)
    for done in (with_redis, without):
        checks = found_in(done)
        assert checks[f"root {tmp_path}/missing"]["verdict"] == "bad"
        assert checks[f"root {tmp_path}/missing"]["found"] == "it does not exist"
        assert checks[f"root {tmp_path}/file"]["found"] == "it is not a directory"
        assert json.loads(done.stdout)["verdict"] == "bad"
        assert "secret" not in done.stdout
    assert found_in(without)["Redis"]["found"].startswith("no broker at redis+socket://")
    assert "warn roots: none\n     -> set FORKVM_ROOTS" in as_text.stdout
    assert "bad  Redis: no broker at redis+socket://" in as_text.stdout
    assert as_text.stderr == ""


@pytest.mark.parametrize(
    "url", ["redis://:se?cret@h:1/0", "redis://u:secret@h/abc", "redis://[secret", "amqp://secret@h"]
)
def test_invalid_url_is_refused_and_its_password_is_not_shown(run_forkvm: RunForkvm, url: str) -> None:
    done = run_forkvm("doctor", env={"FORKVM_BROKER_URL": url})

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("forkvm: FORKVM_BROKER_URL: ")
    assert "cret@" not in line


def test_a_redis_that_may_lose_accepted_jobs_is_bad(run_forkvm: RunForkvm, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendfsync", "no")
        client.config_set("maxmemory", int(client.info()["used_memory"]))

    done = run_forkvm("doctor", "--json", env=program_environment(redis_server))

    checks, redis = found_in(done), f"Redis {redis_server.broker_url}"
    assert done.returncode == 1
    verdicts = {"appendonly": "bad", "maxmemory-policy": "bad", "appendfsync": "warn", "memory": "warn"}
    for what, verdict in verdicts.items():
        assert checks[f"{redis}: {what}"]["verdict"] == verdict
        assert what in checks[f"{redis}: {what}"]["fix"]


def test_checks_that_the_user_of_security_md_may_not_make_are_reported_as_unknown(
    run_forkvm: RunForkvm, secure_redis: SecureRedis
) -> None:
    with_info = run_forkvm("doctor", "--json", env=secure_redis.environment())
    with secure_redis.admin() as admin:
        admin.execute_command("ACL", "SETUSER", "forkvm", "-info")
    without_info = run_forkvm("doctor", "--json", env=secure_redis.environment())

    redis = f"Redis rediss://localhost:{secure_redis.port}/0"
    checks = found_in(with_info)
    assert checks[redis]["found"] == "reached over TLS, certificate and host name verified"
    assert checks[f"{redis}: appendonly"]["verdict"] == "bad"  # the state of that server
    fsync = checks[f"{redis}: appendfsync"]
    assert (fsync["verdict"], fsync["found"]) == ("warn", "unknown: CONFIG is not permitted")
    settings = found_in(without_info)[f"{redis}: settings"]
    assert (settings["verdict"], settings["found"]) == ("warn", "unknown: INFO is not permitted")
    assert (with_info.returncode, without_info.returncode) == (1, 0)
    for done in (with_info, without_info):
        assert done.stderr == ""
        assert secure_redis.password not in done.stdout


def test_a_root_that_the_user_may_not_write_to_is_a_warning_and_nothing_is_left(
    run_forkvm: RunForkvm, fresh: Fresh, no_redis: dict[str, str]
) -> None:
    workdir = fresh("xfs")
    workdir.chmod(0o755)

    done = run_forkvm("doctor", "--json", env=no_redis | {"FORKVM_ROOTS": str(workdir)}, user=_NOBODY)

    check = found_in(done)[f"root {workdir}"]
    assert check["verdict"] == "warn"
    assert check["found"] == f"XFS, not writable for uid {_NOBODY}; reflink not checked"
    assert list(workdir.iterdir()) == []


def test_a_read_only_root_is_reported(
    run_forkvm: RunForkvm, fresh: Fresh, tmp_path: Path, no_redis: dict[str, str]
) -> None:
    with bind_mounted(fresh("xfs"), tmp_path / "view") as view:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)

        done = run_forkvm("doctor", "--json", env=no_redis | {"FORKVM_ROOTS": str(view)})

    check = found_in(done)[f"root {view}"]
    assert (check["verdict"], check["found"]) == ("warn", "XFS, read-only; reflink not checked")


def test_staging_without_a_heartbeat_is_counted_and_left_to_gc(
    run_forkvm: RunForkvm, fresh: Fresh, no_redis: dict[str, str]
) -> None:
    workdir = fresh("xfs")
    for key, is_old in (("0" * 16, True), ("1" * 16, False)):
        (workdir / f".forkvm-{key}").mkdir(mode=0o700)
        (workdir / f".forkvm-{key}.00000000").mkdir()
        if is_old:
            os.utime(workdir / f".forkvm-{key}", (0, 0))
    before = sorted(path.name for path in workdir.iterdir())

    done = run_forkvm("doctor", "--json", env=no_redis | {"FORKVM_ROOTS": str(workdir)})

    check = found_in(done)[f"root {workdir}: staging"]
    assert (check["verdict"], check["found"][:2]) == ("warn", "1 ")
    assert "forkvm gc" in check["fix"]
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_a_root_where_no_fork_can_be_published_is_bad(
    run_forkvm: RunForkvm, passthrough: Passthrough, fresh: Fresh, no_redis: dict[str, str]
) -> None:
    workdir = passthrough(fresh("xfs"), "refuse_flags")

    done = run_forkvm("doctor", "--json", env=no_redis | {"FORKVM_ROOTS": str(workdir)})

    check = found_in(done)[f"root {workdir}"]
    assert (check["verdict"], check["found"]) == ("bad", "FUSE, refuses RENAME_NOREPLACE: EINVAL: Invalid argument")
    assert "forks cannot be published here" in check["fix"]
    assert list(workdir.iterdir()) == []
