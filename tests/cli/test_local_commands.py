"""`forkvm fork` and `verify`, which need no broker."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh, make_subvolume
from tests.fixtures.processes import RunForkvm, forkvm_script, wait_until
from tests.support.guests import GuestSizes, make_guest, make_slow_file
from tests.support.tree import snapshot

SMALL = GuestSizes(overlay=8 << 20, overlay_data=1 << 20, memory=8 << 20, memory_data=1 << 20)


def test_fork_prints_a_result_for_people_and_exits_with_0(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)

    done = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2")

    assert done.returncode == 0
    assert done.stdout.startswith(f"succeeded: {workdir}/vm-1 -> {workdir}/vm-2 in ")
    assert done.stderr == ""
    assert run_forkvm("verify", workdir / "vm-1", workdir / "vm-2").returncode == 0


def test_fork_with_json_prints_the_one_document_of_the_contract(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)

    done = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2", "--label", "rack=7", "--json")

    result = json.loads(done.stdout)
    assert (result["status"], result["error"], result["labels"]) == ("succeeded", None, {"rack": "7"})
    assert result["files"]["reflinked"] == 6


def test_fork_reports_a_subvolume_unless_snapshots_are_disabled(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("btrfs")
    make_guest(make_subvolume(workdir / "vm-1"), SMALL)

    whole = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2")
    by_files = run_forkvm("fork", workdir / "vm-1", workdir / "vm-3", "--snapshot", "never", "--json")

    assert "subvolume" in whole.stdout
    assert json.loads(by_files.stdout)["subvolume"] is False
    assert run_forkvm("verify", workdir / "vm-1", workdir / "vm-2").returncode == 0


def test_a_failed_fork_still_prints_its_result_and_exits_with_1(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)
    (workdir / "vm-2").symlink_to("nowhere")

    done = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2", "--json")

    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "destination_exists"
    assert done.stderr.count("\n") == 1
    assert str(workdir / "vm-2") in done.stderr


def test_a_fork_beyond_its_copy_budget_exits_with_1(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("ext4")
    make_guest(workdir / "vm-1", SMALL)

    done = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2", "--max-copied-bytes", "0")

    assert done.returncode == 1
    assert "copy_budget_exceeded" in done.stderr
    assert [path.name for path in workdir.iterdir()] == ["vm-1"]


def test_estimate_prints_what_a_fork_would_do_and_leaves_nothing(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)

    done = run_forkvm("estimate", workdir / "vm-1", workdir / "vm-2")
    found = json.loads(
        run_forkvm("estimate", workdir / "vm-1", workdir / "vm-2", "--reflink", "never", "--json").stdout
    )
    refused = run_forkvm("estimate", workdir / "vm-1", workdir / "vm-1")

    assert done.stdout.startswith(f"reflink: {workdir}/vm-1 -> {workdir}/vm-2\n")
    assert "fits" in done.stdout
    assert (found["method"], found["reason"], found["fits"]) == ("copy", "reflink=never", True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "destination_exists" in refused.stderr
    assert [path.name for path in workdir.iterdir()] == ["vm-1"]


def test_a_bad_call_exits_with_2_in_one_line(run_forkvm: RunForkvm, tmp_path: Path) -> None:
    no_name = run_forkvm("fork", "", tmp_path / "vm-2")
    wrong_word = run_forkvm("fork", tmp_path, tmp_path / "vm-2", "--reflink", "maybe")
    no_argument = run_forkvm("fork", tmp_path)
    bad_setting = run_forkvm("fork", tmp_path, tmp_path / "vm-2", env={"FORKVM_CHUNK_FILES": "many"})

    assert [done.returncode for done in (no_name, wrong_word, no_argument, bad_setting)] == [2, 2, 2, 2]
    assert "invalid_request: source: the path is not absolute" in no_name.stderr
    assert "reflink" in wrong_word.stderr
    assert "FORKVM_CHUNK_FILES" in bad_setting.stderr
    assert not any("Traceback" in done.stderr for done in (no_name, wrong_word, no_argument, bad_setting))


def test_roots_apply_to_local_commands_too(run_forkvm: RunForkvm, fresh: Fresh, tmp_path: Path) -> None:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)

    done = run_forkvm("fork", workdir / "vm-1", tmp_path / "vm-2", env={"FORKVM_ROOTS": str(workdir)})

    assert done.returncode == 1
    assert "outside_roots" in done.stderr
    assert not (tmp_path / "vm-2").exists()


def test_control_characters_in_names_are_escaped(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    (workdir / "vm-1").mkdir()
    hostile = os.path.join(os.fsencode(workdir), b"vm-1", b"\x1b[2J\xff\n")
    os.mkfifo(hostile)

    done = run_forkvm("fork", workdir / "vm-1", workdir / "vm-2")

    assert "unsupported_file_type" in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_an_interrupted_fork_leaves_nothing_and_reports_that_it_was_cancelled(
    number: signal.Signals, fresh: Fresh
) -> None:
    workdir = fresh("tmpfs")
    (workdir / "vm-1").mkdir()
    for n in range(4):
        make_slow_file(workdir / "vm-1" / f"disk-{n}")
    command = [forkvm_script(), "fork", str(workdir / "vm-1"), str(workdir / "vm-2")]
    default = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    wait_until(lambda: any(path.name.startswith(".forkvm-") for path in workdir.iterdir()), "the staging")

    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "cancelled" in stderr
    assert [path.name for path in workdir.iterdir()] == ["vm-1"]


def test_a_terminal_gets_a_progress_bar(fresh: Fresh) -> None:
    workdir = fresh("tmpfs")
    (workdir / "vm-1").mkdir()
    for n in range(4):
        make_slow_file(workdir / "vm-1" / f"disk-{n}")
    terminal, other_end = pty.openpty()
    try:
        command = [forkvm_script(), "fork", str(workdir / "vm-1"), str(workdir / "vm-2"), "--json"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=other_end, env={**os.environ, "TERM": "xterm"}
        )
        os.close(other_end)
        shown = b""
        while process.poll() is None or not shown:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
            time.sleep(0.01)
        output, _ = process.communicate(timeout=60)
    finally:
        os.close(terminal)

    assert json.loads(output)["status"] == "succeeded"
    assert b"copy" in shown


def test_verify_reports_shared_bytes_and_differences(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    make_guest(workdir / "vm-1", SMALL)
    assert run_forkvm("fork", workdir / "vm-1", workdir / "vm-2").returncode == 0

    same = json.loads(run_forkvm("verify", workdir / "vm-1", workdir / "vm-2", "--json").stdout)
    (workdir / "vm-2" / "config.json").write_text("{}")
    (workdir / "vm-2" / "state").unlink()
    (workdir / "vm-2" / "new").touch()
    os.utime(workdir / "vm-2" / "metadata.json", ns=(0, 0))
    differing = run_forkvm("verify", workdir / "vm-1", workdir / "vm-2", "--json")

    assert same["same"] is True
    assert same["bytes"]["shared"] == same["bytes"]["mapped"] > 2 << 20
    assert differing.returncode == 1
    assert {"config.json", "state", "new", "metadata.json"} <= {
        difference["path"] for difference in json.loads(differing.stdout)["differences"]
    }


def test_verify_finds_hard_links_that_became_separate_files(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    (workdir / "a").mkdir()
    (workdir / "a" / "one").write_text("x")
    (workdir / "a" / "two").hardlink_to(workdir / "a" / "one")
    assert run_forkvm("fork", workdir / "a", workdir / "b").returncode == 0
    assert run_forkvm("verify", workdir / "a", workdir / "b").returncode == 0

    (workdir / "b" / "two").unlink()
    subprocess.run(["cp", "-p", workdir / "b" / "one", workdir / "b" / "two"], check=True)
    done = run_forkvm("verify", workdir / "a", workdir / "b")

    assert done.returncode == 1
    assert "not the same hard links" in done.stdout


def test_a_copy_on_another_filesystem_shares_nothing(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    source, workdir = fresh("xfs"), fresh("ext4")
    make_guest(source / "vm-1", SMALL)
    before = snapshot(source / "vm-1")

    assert run_forkvm("fork", source / "vm-1", workdir / "vm-1").returncode == 0
    found = json.loads(run_forkvm("verify", source / "vm-1", workdir / "vm-1", "--json").stdout)

    assert found["same"] is True
    assert found["bytes"]["shared"] == 0
    assert snapshot(source / "vm-1") == before


def test_relative_paths_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "guests" / "vm-1").mkdir(parents=True)
    (tmp_path / "below").symlink_to(tmp_path / "guests" / "vm-1")
    calls = [
        ["fork", "guests/vm-1", "guests/vm-2"],
        ["fork", "./guests/vm-1/", "guests/../guests/vm-3"],
        ["fork", "below/../vm-1", "below/../vm-4"],  # the path that the kernel resolves through the symlink
        ["campaign", "guests/vm-1", "--to", "guests/many-{n}", "--count", "2", "--local"],
        ["verify", "guests/vm-1", "guests/vm-2"],
        ["gc", "."],
    ]

    codes = [subprocess.run([forkvm_script(), *call], cwd=tmp_path, check=False).returncode for call in calls]

    assert codes == [0] * len(calls)
    names = ["many-1", "many-2", "vm-1", "vm-2", "vm-3", "vm-4"]
    assert sorted(path.name for path in (tmp_path / "guests").iterdir()) == names


def test_a_working_directory_that_was_removed_is_a_bad_call(tmp_path: Path) -> None:
    script = f"mkdir gone; cd gone; rmdir ../gone; {forkvm_script()} fork a /b"

    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "Error: the working directory was removed; use absolute paths" in done.stderr
