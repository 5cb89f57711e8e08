"""`forkvm campaign` and `forkvm forks`, and the output of `status` and `cancel` for campaigns."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from contextlib import ExitStack, suppress
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
from tests.support.guests import GuestSizes, make_guest
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import stopped_when

SMALL = GuestSizes(overlay=1 << 20, overlay_data=1 << 18, memory=1 << 20, memory_data=1 << 18, config=1 << 16)


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("xfs")
    make_guest(workdir / "vm", SMALL)
    return workdir


def forks_in(workdir: Path) -> list[str]:
    return sorted(path.name for path in workdir.iterdir() if path.name != "vm")


def test_local_makes_a_campaign_without_a_broker_and_prints_text(run_forkvm: RunForkvm, workdir: Path) -> None:
    done = run_forkvm("campaign", workdir / "vm", "--to", f"{workdir}/vm-{{n:03}}", "--count", "12", "--local")

    assert done.returncode == 0
    assert done.stdout.startswith(f"succeeded: {workdir}/vm -> 12 forks in ")
    assert "12 succeeded" in done.stdout
    assert done.stderr == ""
    assert forks_in(workdir) == [f"vm-{n:03}" for n in range(1, 13)]
    assert run_forkvm("verify", workdir / "vm", workdir / "vm-012").returncode == 0


def test_local_with_json_prints_the_one_document_of_the_contract(run_forkvm: RunForkvm, workdir: Path) -> None:
    (workdir / "list").write_bytes(b"".join(os.fsencode(workdir) + b"/vm-\xff-%d\n" % n for n in range(4)) + b"\n")

    done = run_forkvm("campaign", workdir / "vm", "--to-file", workdir / "list", "--local", "--json", "--id", "c1")

    result = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (result["campaign_id"], result["status"], result["forks"]["succeeded"]) == ("c1", "succeeded", 4)
    assert (workdir / os.fsdecode(b"vm-\xff-3")).is_dir()


def test_local_with_failures_exits_with_1_and_names_them(run_forkvm: RunForkvm, workdir: Path) -> None:
    (workdir / "vm-2").mkdir()

    done = run_forkvm(
        "campaign", workdir / "vm", "--to-file", "-", "--local", stdin=f"{workdir}/vm-1\n{workdir}/vm-2\n"
    )

    assert done.returncode == 1
    assert done.stdout.startswith("partial: ")
    assert f"destination_exists: {workdir}/vm-2" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_bad_call_exits_with_2_in_one_line_and_makes_nothing(run_forkvm: RunForkvm, workdir: Path) -> None:
    """The error comes before any connection: there is no broker here."""
    source, template = str(workdir / "vm"), f"{workdir}/vm-{{n}}"
    calls = {
        ("campaign",): "SOURCE",
        ("campaign", source): "destinations",
        ("campaign", source, "--to", template): "--count",
        ("campaign", source, "--to", template, "--to-file", "-"): "destinations",
        ("campaign", source, "--to-file", f"{workdir}/missing"): "No such file",
        ("campaign", source, "--to", template, "--count", "many"): "--count",
        ("campaign", source, "--to", f"{workdir}/same", "--count", "2"): "twice",
        ("campaign", source, "--to", template, "--count", "2", "--on-error", "panic"): "--on-error",
        ("campaign", source, "--to", f"{workdir}/vm-{{n.real}}", "--count", "2", "--local"): "template",
    }

    for call, message in calls.items():
        done = run_forkvm(*call, env={"FORKVM_BROKER_URL": f"redis+socket://{workdir}/nobody"})
        assert done.returncode == 2, (call, done)
        assert message in done.stderr, (call, done.stderr)
        assert "Traceback" not in done.stderr

    assert forks_in(workdir) == []


def test_a_retry_refuses_every_option_that_it_would_ignore(run_forkvm: RunForkvm, workdir: Path) -> None:
    """The error comes before any connection: there is no broker here."""
    arguments = {
        "SOURCE": [f"{workdir}/vm"],
        "--to": ["--to", f"{workdir}/vm-{{n}}"],
        "--count": ["--count", "2"],
        "--start": ["--start", "1"],
        "--to-file": ["--to-file", "-"],
        "--max-parallel": ["--max-parallel", "2"],
        "--on-error": ["--on-error", "abort"],
        "--deadline": ["--deadline", "9"],
        "--reflink": ["--reflink", "never"],
        "--no-exclude": ["--no-exclude"],
        "--label": ["--label", "a=b"],
    }

    for name, option in arguments.items():
        done = run_forkvm("campaign", "--retry", "c1", *option, env={"FORKVM_BROKER_URL": "redis+socket:///nobody"})
        assert (done.returncode, done.stdout) == (2, ""), name
        assert done.stderr.endswith(f"leave out {name}\n"), (name, done.stderr)


def test_a_retry_uses_the_domain_of_the_option_or_of_the_campaign(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    # Given a campaign of the default domain in which one fork failed
    environment = program_environment(redis_server, workdir)
    start_worker(workdir, 1)
    (workdir / "vm-1").mkdir()
    send = ["campaign", str(workdir / "vm"), "--to", f"{workdir}/vm-{{n}}", "--count", "2", "--id", "c1", "--wait"]
    assert run_forkvm(*send, env=environment).returncode == 1
    retry = ["campaign", "--retry", "c1"]

    # When
    other_domain = run_forkvm(*retry, "--id", "c2", "--domain", "nvme-b", env=environment)
    same_domain = run_forkvm(*retry, "--id", "c3", "--wait", env={**environment, "FORKVM_DOMAIN": "nvme-b"})

    # Then
    assert (other_domain.returncode, same_domain.returncode) == (0, 1)
    assert "destination_exists" in same_domain.stdout
    with redis_server.client() as client:
        (waiting,) = client.lrange("forkvm.nvme-b", 0, -1)
        assert json.loads(waiting)["headers"]["id"] == "c2"
        client.delete("forkvm.nvme-b")


def test_an_unknown_campaign_id_is_a_bad_call(run_forkvm: RunForkvm, redis_server: RedisServer) -> None:
    environment = program_environment(redis_server)

    for call in (["campaign", "--retry", "never"], ["forks", "never"]):
        done = run_forkvm(*call, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert "never: " in done.stderr
        assert "Traceback" not in done.stderr


def test_without_a_broker_campaigns_exit_with_3_in_one_line(run_forkvm: RunForkvm, tmp_path: Path) -> None:
    environment = {"FORKVM_BROKER_URL": f"redis+socket://{tmp_path}/nobody"}

    for command in (["campaign", "/a", "--to", "/b-{n}", "--count", "2"], ["forks", "c"], ["campaign", "--retry", "c"]):
        done = run_forkvm(*command, env=environment)
        assert done.returncode == 3, command
        assert done.stderr.startswith("forkvm: no broker at redis+socket://"), command
        assert done.stderr.count("\n") == 1, command


def test_a_campaign_is_sent_waited_for_listed_and_retried(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, redis_server: RedisServer
) -> None:
    # Given two destinations that exist
    environment = program_environment(redis_server, workdir)
    start_worker(workdir, command="forkvm", args=["--domain", "nvme-a"])
    for n in (3, 7):
        (workdir / f"vm-{n}").mkdir()
    send = ["campaign", str(workdir / "vm"), "--to", f"{workdir}/vm-{{n}}", "--count", "20", "--domain", "nvme-a"]

    # When
    waited = run_forkvm(*send, "--id", "c1", "--label", "rack=7", "--wait", "--json", env=environment)
    status = run_forkvm("status", "c1", "--json", env=environment)
    shown = run_forkvm("status", "c1", env=environment)
    listed = run_forkvm("forks", "c1", "--json", env=environment)
    failed = run_forkvm("forks", "c1", "--failed", env=environment)

    # Then
    result = json.loads(waited.stdout)
    assert (waited.returncode, status.returncode, shown.returncode) == (1, 1, 1)
    assert (result["status"], result["forks"]["succeeded"], result["forks"]["failed"]) == ("partial", 18, 2)
    assert json.loads(status.stdout) == {"id": "c1", "state": "SUCCESS", "progress": None, "result": result}
    assert "c1.3: destination_exists" in shown.stdout
    forks = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [fork["fork_id"] for fork in forks] == [f"c1.{n}" for n in range(1, 21)]
    assert [line.split()[:2] for line in failed.stdout.splitlines()] == [["failed", "c1.3"], ["failed", "c1.7"]]

    # When the failed forks are retried, now that their destinations are free
    identity = (workdir / "vm-1").stat().st_ino
    for n in (3, 7):
        (workdir / f"vm-{n}").rmdir()
    retry = ["campaign", "--retry", "c1", "--id", "c2", "--wait", "--json"]
    retried = run_forkvm(*retry, env=environment)  # in the domain of the campaign that is retried
    nothing = run_forkvm("campaign", "--retry", "c2", "--wait", env=environment)

    # Then only those forks were made
    assert retried.returncode == 0
    assert json.loads(retried.stdout)["forks"] == {"total": 2, "succeeded": 2, "failed": 0, "cancelled": 0}
    assert (workdir / "vm-1").stat().st_ino == identity
    assert forks_in(workdir) == sorted(f"vm-{n}" for n in range(1, 21))
    forks = [json.loads(line) for line in run_forkvm("forks", "c2", "--json", env=environment).stdout.splitlines()]
    assert [(fork["destination"], fork["labels"]) for fork in forks] == [
        (f"{workdir}/vm-{n}", {"rack": "7"}) for n in (3, 7)
    ]
    assert nothing.returncode == 0
    assert "nothing to retry" in nothing.stderr


def test_a_running_campaign_is_watched_with_a_bar_and_cancelled(
    run_forkvm: RunForkvm, workdir: Path, start_worker: StartWorker, own_scheduler: Scheduler
) -> None:
    # Given a half-done campaign that is paused
    environment = program_environment(own_scheduler.server, workdir)
    worker = start_worker(workdir, 1)
    send = ["campaign", str(workdir / "vm"), "--to", f"{workdir}/vm-{{n}}", "--count", "1000", "--id", "c1"]
    sent = run_forkvm(*send, env=environment)
    states = own_scheduler.results.states

    def half_done() -> bool:
        record = states.get("c1")
        return bool(record["status"] == "PROGRESS" and record["result"]["forks_done"] > 0)

    with ExitStack() as stack:
        with stopped_when(worker, half_done, "a half-done campaign"):
            # When
            terminal, other_end = pty.openpty()
            stack.callback(os.close, terminal)
            watch = begin(["status", "c1", "--watch", "--json"], environment | {"TERM": "xterm"}, other_end)
            watching = stack.enter_context(ended_at_exit(watch))
            os.close(other_end)
            shown = b""
            while b"/1000" not in shown:
                shown += os.read(terminal, 4096)
            status = json.loads(run_forkvm("status", "c1", "--json", env=environment).stdout)
            retry = run_forkvm("campaign", "--retry", "c1", env=environment)
            cancelling = stack.enter_context(ended_at_exit(begin(["cancel", "c1", "--json"], environment)))
            wait_until(lambda: own_scheduler.results.cancellations.is_requested("c1"), "the request to cancel")
        with suppress(OSError):  # EIO: the other end is closed
            while more := os.read(terminal, 4096):
                shown += more
        answer = json.loads(cancelling.communicate(timeout=60)[0])
        output, _ = watching.communicate(timeout=60)

    # Then
    assert sent.stdout == "c1\n"
    assert b"forks" in shown
    assert b"/s" in shown
    assert status["state"] == "PROGRESS"
    assert set(status["progress"]) == {"forks_done", "forks_total", "forks_failed", "eta_seconds"}
    assert retry.returncode == 2
    assert "not ended yet" in retry.stderr
    assert answer["state"] == "REVOKED"
    assert answer["result"]["status"] == "cancelled"
    assert cancelling.returncode == 0
    assert json.loads(output)["result"] == answer["result"]
    assert watching.returncode == 1
    own_scheduler.wait_quiet()
    assert len(forks_in(workdir)) == answer["result"]["forks"]["succeeded"] > 0


def begin(command: list[str], environment: dict[str, str], stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Start a command."""
    return subprocess.Popen([forkvm_script(), *command], env=environment, stdout=subprocess.PIPE, stderr=stderr)


def test_an_interrupted_local_campaign_keeps_and_reports_published_forks(workdir: Path) -> None:
    command = [forkvm_script(), "campaign", str(workdir / "vm"), "--to", f"{workdir}/vm-{{n}}", "--count", "5000"]
    started = subprocess.Popen([*command, "--local"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with ended_at_exit(started) as process:
        wait_until((workdir / "vm-1").exists, "the first fork")

        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)

    assert process.returncode == 1
    assert stdout.startswith("cancelled: ")
    assert "SIGINT" in stderr
    assert "Traceback" not in stderr
    existing = forks_in(workdir)
    assert not any(name.startswith(".forkvm") for name in existing)
    assert f"{len(existing)} succeeded" in stdout
