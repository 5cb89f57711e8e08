"""`forkvm submit`, `status`, `files`, `cancel` and `worker`, with a real Redis and a real worker."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import (
    RunForkvm,
    StartWorker,
    ended_at_exit,
    forkvm_script,
    program_environment,
    wait_until,
)
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import GuestSizes, make_guest, make_slow_file
from tests.support.system.systems import stopped_when

SMALL = GuestSizes(overlay=8 << 20, overlay_data=1 << 20, memory=8 << 20, memory_data=1 << 20)


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)
    return workdir


def test_submit_wait_prints_the_result_that_status_and_files_print_later(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)
    start_worker(workdir, command="forkvm")

    waited = run_forkvm("submit", workdir / "vm-1", workdir / "vm-2", "--id", "f1", "--wait", "--json", env=environment)
    status = run_forkvm("status", "f1", "--json", env=environment)
    listed = run_forkvm("files", "f1", "--json", env=environment)
    shown = run_forkvm("files", "f1", env=environment)

    result = json.loads(waited.stdout)
    assert waited.returncode == 0
    assert result["status"] == "succeeded"
    assert result["fork_id"] == "f1"
    assert json.loads(status.stdout) == {"id": "f1", "state": "SUCCESS", "progress": None, "result": result}
    files = [json.loads(line) for line in listed.stdout.splitlines()]
    assert len(files) == result["files"]["total"] == len(shown.stdout.splitlines())
    assert sum(entry["bytes"] for entry in files) == result["bytes"]["logical"]


def test_a_failed_fork_exits_with_1_and_its_failed_entries_can_be_listed(
    run_forkvm: RunForkvm, workdir: Path, fresh: Fresh, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    other = fresh("ext4")
    environment = program_environment(redis_server, [workdir, other])
    start_worker([workdir, other])

    waited = run_forkvm(
        "submit", workdir / "vm-1", other / "vm-2", "--id", "f1", "--reflink", "always", "--wait", env=environment
    )
    status = run_forkvm("status", "f1", env=environment)
    failed = run_forkvm("files", "f1", "--failed", env=environment)

    assert waited.returncode == status.returncode == 1
    assert "reflink_unsupported" in waited.stderr
    assert "Traceback" not in waited.stderr
    assert "reflink_unsupported" in status.stdout
    assert len(failed.stdout.splitlines()) == 1
    assert [path.name for path in other.iterdir()] == []


def test_an_invalid_request_is_refused_before_it_is_sent(
    run_forkvm: RunForkvm, workdir: Path, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)

    done = run_forkvm("submit", workdir / "vm-1", workdir / "vm-2", "--reflink", "maybe", env=environment)

    assert done.returncode == 2
    assert "'maybe' is not one of 'auto', 'always', 'never'" in done.stderr
    with redis_server.client() as client:
        assert client.llen("forkvm") == 0


def test_without_a_broker_every_queue_command_exits_with_3_in_one_line(run_forkvm: RunForkvm, tmp_path: Path) -> None:
    environment = {"FORKVM_BROKER_URL": f"redis+socket://{tmp_path}/nobody"}
    queries = (["status", "f1"], ["files", "f1"], ["cancel", "f1"], ["queues"], ["report", "f1", "-o", "page.html"])
    for command in (["submit", "/a", "/b"], *queries):
        done = run_forkvm(*command, env=environment)
        assert done.returncode == 3, command
        assert done.stderr.startswith("forkvm: no broker at redis+socket://"), command
        assert done.stderr.count("\n") == 1, command


def test_a_result_backend_that_fails_is_named_by_commands_and_by_a_worker(
    run_forkvm: RunForkvm, redis_server: RedisServer, start_worker: StartWorker, tmp_path: Path
) -> None:
    backend = f"redis+socket://{tmp_path}/nobody"
    settings = {"FORKVM_RESULT_BACKEND": f"{backend}?password=a-secret"}
    environment = program_environment(redis_server) | settings

    done = [run_forkvm(*command, env=environment) for command in (["status", "f1"], ["submit", "/a", "/b"], ["doctor"])]
    worker = start_worker(tmp_path, 1, env=settings)

    assert [one.returncode for one in done] == [3, 3, 3]
    for text in (done[0].stderr, done[1].stderr, done[2].stdout):
        assert f"no result backend at {backend}: " in text
    assert f"the worker waits for the result backend at {backend}: " in worker.output()
    assert "a-secret" not in worker.output() + "".join(one.stdout + one.stderr for one in done)


@pytest.mark.parametrize("command", ["status", "files", "forks", "cancel", "report -o page.html"])
def test_an_unknown_id_is_a_bad_call(
    command: str, run_forkvm: RunForkvm, redis_server: RedisServer, tmp_path: Path
) -> None:
    done = run_forkvm(*command.split(), "never-sent", env=program_environment(redis_server))

    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "page.html").exists()
    assert done.stderr.startswith("forkvm: never-sent: unknown id")
    assert done.stderr.count("\n") == 1
    with redis_server.client() as client:
        assert client.keys("forkvm:never-sent*") == []


def test_the_status_of_an_unknown_id_is_still_one_json_document(
    run_forkvm: RunForkvm, redis_server: RedisServer
) -> None:
    done = run_forkvm("status", "never-sent", "--json", env=program_environment(redis_server))

    assert done.returncode == 2
    assert json.loads(done.stdout) == {"id": "never-sent", "state": "PENDING", "progress": None, "result": None}


def test_a_fork_that_waits_in_the_queue_has_a_status_and_can_be_cancelled(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    # Given a fork that waits behind others in the queue
    environment = program_environment(redis_server, workdir)
    for number in range(3):
        run_forkvm("submit", workdir / "vm-1", workdir / f"vm-{number}0", "--id", f"f{number}", env=environment)

    # When
    waiting = run_forkvm("status", "f1", env=environment)
    cancelled = run_forkvm("cancel", "f1", env=environment, timeout=60)
    start_worker(workdir)
    wait_until(lambda: run_forkvm("status", "f1", env=environment).returncode == 1, "the end of the fork")

    # Then
    assert (waiting.returncode, waiting.stdout) == (0, "f1: PENDING; waiting in the queue\n")
    assert (cancelled.returncode, cancelled.stdout) == (0, "f1: cancellation requested; waiting for a worker\n")
    assert run_forkvm("status", "f2", env=environment).stdout.startswith("succeeded")
    assert "cancelled" in run_forkvm("status", "f1", env=environment).stdout
    assert not (workdir / "vm-10").exists()


def test_submit_wait_prints_its_id_and_reports_that_no_worker_serves_the_queue(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)
    start_worker(workdir, command="forkvm", args=["--domain", "elsewhere"])

    done = run_forkvm(
        "submit", workdir / "vm-1", workdir / "vm-2", "--id", "f 1", "--wait", "--timeout", "4", env=environment
    )

    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr.splitlines() == [
        "forkvm: waiting for f 1",
        "forkvm: no worker serves the queue forkvm; f 1 waits until one does",
        "forkvm: f 1 did not end within 4 s and continues; to see it: forkvm status 'f 1'",
    ]
    with redis_server.client() as client:
        client.delete("forkvm")


def test_a_command_that_stops_waiting_in_another_domain_names_a_command_that_finds_the_job(
    run_forkvm: RunForkvm, workdir: Path, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)
    command = ("submit", workdir / "vm-1", workdir / "vm-2", "--id", "f-1", "--domain", "elsewhere")

    done = run_forkvm(*command, "--wait", "--timeout", "0.1", env=environment)
    found = run_forkvm("status", "f-1", env={**environment, "FORKVM_DOMAIN": "elsewhere"})

    assert done.returncode == 124
    assert done.stderr.endswith("to see it: FORKVM_DOMAIN=elsewhere forkvm status f-1\n")
    assert (found.returncode, found.stdout) == (0, "f-1: PENDING; waiting in the queue\n")
    with redis_server.client() as client:
        client.delete("forkvm.elsewhere")


def test_a_redis_that_stops_while_a_command_waits_is_a_one_line_error(
    workdir: Path, redis_server: RedisServer, run_forkvm: RunForkvm
) -> None:
    environment = program_environment(redis_server, workdir)
    command = [forkvm_script(), "submit", str(workdir / "vm-1"), str(workdir / "vm-2"), "--wait"]
    with ended_at_exit(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("forkvm: waiting for ")

        redis_server.stop()
        stderr = process.communicate(timeout=60)[1]

    assert (process.returncode, stderr.count("\n")) == (3, 1)
    assert stderr.startswith("forkvm: Redis: ")
    redis_server.start()
    with redis_server.client() as client:
        client.delete("forkvm")


def test_cancel_waits_for_the_end_of_a_running_fork_which_leaves_nothing(
    run_forkvm: RunForkvm, fresh: Fresh, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    workdir = fresh("tmpfs")
    (workdir / "vm-1").mkdir()
    for n in range(4):
        make_slow_file(workdir / "vm-1" / f"disk-{n}")
    environment = program_environment(redis_server, workdir)
    worker = start_worker(workdir, env={"FORKVM_CHUNK_BYTES": str(16 << 20)})
    run_forkvm("submit", workdir / "vm-1", workdir / "vm-2", "--id", "f1", env=environment)

    def has(key: str, text: str) -> bool:
        with redis_server.client() as client:
            return text in str(client.get(key))

    # The fork stays paused until its cancellation is requested, since a command starts slowly on a busy machine.
    with stopped_when(worker, lambda: has("celery-task-meta-f1", "PROGRESS"), "progress"):
        running = json.loads(run_forkvm("status", "f1", "--json", env=environment).stdout)
        command = [forkvm_script(), "cancel", "f1", "--json"]
        cancel = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        wait_until(lambda: has("forkvm:f1:cancel", "1"), "the request to cancel")
    with ended_at_exit(cancel):
        cancelled = json.loads(cancel.communicate(timeout=60)[0])

    assert running["state"] == "PROGRESS"
    assert set(running["progress"]) == {"files_done", "files_total", "bytes_done", "bytes_total", "phase"}
    assert cancelled["state"] == "REVOKED"
    assert cancelled["result"]["status"] == "cancelled"
    assert [path.name for path in workdir.iterdir()] == ["vm-1"]
    assert json.loads(run_forkvm("status", "f1", "--json", env=environment).stdout)["state"] == "REVOKED"


def test_cancel_of_a_finished_fork_changes_nothing_and_exits_with_1(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)
    start_worker(workdir)
    run_forkvm("submit", workdir / "vm-1", workdir / "vm-2", "--id", "f1", "--wait", env=environment)

    done = run_forkvm("cancel", "f1", env=environment)

    assert done.returncode == 1
    assert done.stdout.startswith("succeeded")
    assert done.stderr == "forkvm: f1: not cancelled: it has ended already (SUCCESS)\n"
    assert (workdir / "vm-2").is_dir()


def test_a_domain_has_a_queue_of_its_own_that_only_its_worker_serves(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    environment = program_environment(redis_server, workdir)
    start_worker(workdir, command="forkvm", args=["--domain", "nvme-a"])
    default = start_worker(workdir)

    done = run_forkvm(
        "submit", workdir / "vm-1", workdir / "vm-2", "--domain", "nvme-a", "--id", "f1", "--wait", env=environment
    )

    assert done.returncode == 0
    assert "[f1]" not in default.output()
