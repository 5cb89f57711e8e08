"""A Redis with TLS and minimal rights: forks run on it, and connections that cannot be verified are refused."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import RunForkvm, StartWorker, wait_until
from tests.fixtures.secure_redis import SecureRedis
from tests.support.engine.forks import assert_alike
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.system.queued_campaigns import make_source
from tests.support.system.systems import SMALL_LIMITS, send

#: A file of a guest, and its content: neither may appear in a log.
SECRET_NAME, SECRET_DATA = "secret-name.raw", b"what a guest knows"

#: The number of forks of a campaign that still runs when the command that sent it has ended, even on a fast machine.
_MANY = 1_500


def _refusals(server: SecureRedis) -> list[str]:
    with server.admin() as admin:
        return [f"{entry['reason']}: {entry['object']}" for entry in admin.execute_command("ACL", "LOG")]


def test_forks_run_over_tls_with_the_documented_rights_even_if_a_worker_is_killed_and_no_log_has_secrets(
    secure_redis: SecureRedis, start_worker: StartWorker, run_forkvm: RunForkvm, fresh: Fresh, mounts: Path
) -> None:
    # Given
    directory = fresh("ext4")
    source = make_guest(directory / "source")
    (source / SECRET_NAME).write_bytes(SECRET_DATA)
    environment = secure_redis.environment() | SMALL_LIMITS | {"FORKVM_VISIBILITY_TIMEOUT": "5"}
    # The worker that is killed sends no sweep: its one child could be given it before the fork.
    killed_worker = start_worker(mounts, 1, env=environment | {"FORKVM_VISIBILITY_TIMEOUT": "600"})

    # When the first worker is killed while it makes a fork, and another worker starts
    send(killed_worker.children, signal.SIGSTOP)
    run_forkvm("submit", source, directory / "lost", "--id", "lost", env=environment)
    wait_until(lambda: "Task forkvm.fork[lost] received" in killed_worker.output(), "the fork to be taken")
    killed_worker.kill()
    worker = start_worker(mounts, 2, env=environment)
    done = run_forkvm("submit", source, directory / "fork", "--id", "one", "--wait", "--json", env=environment)
    watched = run_forkvm("status", "lost", "--watch", "--json", env=environment)
    listed = run_forkvm("files", "one", "--json", env=environment)
    cancelled = run_forkvm("cancel", "one", "--json", env=environment)
    taken = directory / "fork"  # one of the campaign's forks fails, so that failures are stored too
    taken_and_free = f"{taken}\n{directory / 'second'}\n{directory / 'third'}\n"
    campaign = run_forkvm(
        "campaign", source, "--to-file", "-", "--id", "many", "--wait", "--json", env=environment, stdin=taken_and_free
    )
    forks = run_forkvm("forks", "many", "--json", env=environment)

    # Then
    assert _refusals(secure_redis) == []
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["chunks"] > 1
    assert len(listed.stdout.splitlines()) == result["files"]["total"]
    assert SECRET_NAME in listed.stdout
    assert json.loads(watched.stdout)["state"] == "SUCCESS"
    assert json.loads(cancelled.stdout)["result"]["status"] == "succeeded"
    assert json.loads(campaign.stdout)["forks"] == {"total": 3, "succeeded": 2, "failed": 1, "cancelled": 0}
    assert len(forks.stdout.splitlines()) == 3
    for fork in ("fork", "lost", "second", "third"):
        assert_alike(source, directory / fork, SKIPPED_BY_DEFAULT)
    worker.end()
    assert _refusals(secure_redis) == []
    pages = _pages(secure_redis)
    assert pages
    for log in (killed_worker.output(), worker.output()):
        assert "Task forkvm.fork" in log
        for secret in (secure_redis.password, SECRET_NAME, SECRET_DATA.decode(), '"copied_bytes"', *pages):
            assert secret not in log


def test_running_campaigns_are_cancelled_and_retried_with_the_documented_rights(
    secure_redis: SecureRedis, start_worker: StartWorker, run_forkvm: RunForkvm, fresh: Fresh, mounts: Path
) -> None:
    # Given a half-done campaign that is paused, even if this process gets little CPU time to stop it
    directory = fresh("ext4")
    source, environment = make_source(directory / "source"), secure_redis.environment() | SMALL_LIMITS
    worker = start_worker(mounts, 2, env=environment)
    aims = ("--to", f"{directory}/vm-{{n:04}}", "--count", str(_MANY))
    run_forkvm("campaign", source, *aims, "--id", "many", env=environment)
    wait_until((directory / "vm-0001").exists, "the first fork")
    children = worker.children
    send(children, signal.SIGSTOP)

    # When a process is lost, which its worker counts, and the campaign is cancelled
    send(children[:1], signal.SIGKILL)
    with secure_redis.admin() as admin, ThreadPoolExecutor(1) as executor:
        cancelling = executor.submit(run_forkvm, "cancel", "many", "--json", env=environment)
        wait_until(lambda: bool(admin.exists("forkvm:many:cancel")), "the request to cancel")
        send(children[1:], signal.SIGCONT)
        cancelled = cancelling.result()
    retried = run_forkvm("campaign", "--retry", "many", "--id", "rest", "--wait", "--json", env=environment)

    # Then
    assert _refusals(secure_redis) == []
    assert cancelled.returncode == 0, cancelled.stderr
    forks = json.loads(cancelled.stdout)["result"]["forks"]
    assert forks["succeeded"] > 0
    assert forks["cancelled"] > 0
    assert retried.returncode == 0, retried.stderr
    assert json.loads(retried.stdout)["forks"] == {
        "total": forks["cancelled"],
        "succeeded": forks["cancelled"],
        "failed": 0,
        "cancelled": 0,
    }
    assert len(list(directory.glob("vm-*"))) == _MANY
    worker.end()
    assert _refusals(secure_redis) == []


def _pages(server: SecureRedis) -> list[str]:
    """The FileResults that Redis stores, each page in the forms in which a log could contain it."""
    with server.admin(decode_responses=False) as admin:
        keys = [key for key in admin.scan_iter(match=b"forkvm:*:page*") if admin.type(key) == b"string"]
        pages = [page for page in admin.mget(keys) if page]
    return [text for page in pages for text in (repr(page)[2:40], page.decode(errors="replace")[:40])]


def test_only_documented_rights_are_given(secure_redis: SecureRedis) -> None:
    with secure_redis.admin() as admin:
        dry = ["ACL", "DRYRUN", "forkvm"]
        assert admin.execute_command(*dry, "SET", "forkvm:x:result", "1") in ("OK", b"OK")
        for command in (["SET", "other", "1"], ["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["EVAL", "x", "0"]):
            assert "has no permissions" in str(admin.execute_command(*dry, *command))


def test_a_server_that_cannot_be_verified_is_refused_with_one_line_and_exit_code_3(
    secure_redis: SecureRedis, start_worker: StartWorker, run_forkvm: RunForkvm, mounts: Path
) -> None:
    untrusted = secure_redis.environment() | {"FORKVM_REDIS_CA": str(secure_redis.other_ca)}
    unnamed = secure_redis.environment() | {"FORKVM_REDIS_CA": ""}  # the system's CA certificates do not include it
    another_host = secure_redis.environment(host="127.0.0.1")

    worker = start_worker(mounts, 1, command="forkvm", env=another_host, wait=False)
    refusals = [run_forkvm("status", "one", env=environment) for environment in (untrusted, unnamed, another_host)]

    assert worker.wait() == 3
    assert [done.returncode for done in refusals] == [3, 3, 3]
    for text in (*(done.stderr for done in refusals), worker.output()):
        (line,) = text.splitlines()
        assert line.startswith("forkvm: ")
        assert "CERTIFICATE_VERIFY_FAILED" in line
        assert "localhost" in line or "127.0.0.1" in line
        assert secure_redis.password not in line


def test_a_missing_ca_file_is_a_bad_setting(run_forkvm: RunForkvm, tmp_path: Path) -> None:
    done = run_forkvm("status", "one", env={"FORKVM_REDIS_CA": str(tmp_path / "none")})

    assert done.returncode == 2
    assert "FORKVM_REDIS_CA" in done.stderr


def test_a_wrong_password_is_reported_without_repeating_it(
    secure_redis: SecureRedis, start_worker: StartWorker, run_forkvm: RunForkvm, mounts: Path
) -> None:
    environment = secure_redis.environment(password="hunter2-and-more")

    refusals = run_forkvm("status", "one", env=environment)
    worker = start_worker(mounts, 1, env=environment, wait=False)
    wait_until(lambda: "invalid username-password pair" in worker.output(), "the worker's error message")
    worker.kill()

    assert refusals.returncode == 3
    assert "invalid username-password pair" in refusals.stderr
    assert "hunter2" not in refusals.stderr + refusals.stdout + worker.output()
