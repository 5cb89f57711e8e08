"""The number of CPUs that a worker may use, and the pool size and node name that follow."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.cpus import available_cpus, cpu_quotas, cpus_within
from worker.runtime.configuration import make_app
from worker.runtime.node_name import node_name
from worker.settings import BadSettings, read_settings

#: Prints the number of CPUs that a process counts, and the pool that Celery would start by default.
COUNT = """
from worker.runtime.configuration import make_app
from worker.cpus import available_cpus
from worker.settings import read_settings
print(available_cpus(), make_app(read_settings()).conf.worker_concurrency)
"""


def _group(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")
    return directory


def _mount(point: Path, root: str, kind: str, options: str = "rw") -> str:
    return f"33 32 0:28 {root} {point} ro,nosuid shared:9 - {kind} {kind} {options}\n"


@pytest.mark.parametrize(
    ("affinity", "quotas", "expected"),
    [(8, [], 8), (8, [2.0], 2), (8, [1.5], 2), (8, [0.1], 1), (2, [6.0], 2), (8, [4.0, 3.0, 5.0], 3), (1, [0.5], 1)],
)
def test_the_smallest_limit_applies_and_is_rounded_up(affinity: int, quotas: list[float], expected: int) -> None:
    assert cpus_within(affinity, quotas) == expected


def test_quota_of_the_unified_hierarchy_includes_all_parent_groups(tmp_path: Path) -> None:
    _group(tmp_path, cpu__max="max 100000")
    _group(tmp_path / "pods", cpu__max="300000 100000")
    _group(tmp_path / "pods" / "a", cpu__max="max 100000")

    assert cpu_quotas("0::/pods/a\n", _mount(tmp_path, "/", "cgroup2")) == [3.0]


def test_quota_of_version_1_is_read_where_cpu_time_is_mounted(tmp_path: Path) -> None:
    _group(tmp_path / "cpu" / "pod", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    _group(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    _group(tmp_path / "memory" / "pod", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    mounts = _mount(tmp_path / "cpu", "/", "cgroup", "rw,cpu,cpuacct") + _mount(
        tmp_path / "memory", "/", "cgroup", "rw,memory"
    )

    assert cpu_quotas("4:memory:/pod\n2:cpu,cpuacct:/pod\n1:name=systemd:/pod\n0::/pod\n", mounts) == [1.5]


@pytest.mark.parametrize("group", ["/docker/2a", "/docker/2a\\x2d", "/"])
def test_container_that_sees_its_own_group_as_the_root_finds_its_quota(tmp_path: Path, group: str) -> None:
    _group(tmp_path, cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    mounts = _mount(tmp_path, group.replace("\\", "\\134"), "cgroup", "rw,cpu")

    assert cpu_quotas(f"1:cpu:{group}\n", mounts) == [2.0]


def test_group_outside_the_mount_counts_as_the_root_of_the_mount(tmp_path: Path) -> None:
    _group(tmp_path, cpu__max="200000 100000")

    assert cpu_quotas("0::/../other\n", _mount(tmp_path, "/docker/2a", "cgroup2")) == [2.0]


@pytest.mark.parametrize("text", ["", "max", "much 100000", "100000 0"])
def test_quota_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    _group(tmp_path, cpu__max=text)

    assert cpu_quotas("0::/\n", _mount(tmp_path, "/", "cgroup2")) == []


def test_affinity_of_the_process_is_used() -> None:
    one = min(os.sched_getaffinity(0))

    done = subprocess.run(
        ["taskset", "--cpu-list", str(one), sys.executable, "-c", COUNT], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["1", "1"]


def test_quota_of_a_real_control_group_is_used(cpu_group: Path) -> None:
    if (cpu_group / "cpu.max").exists():
        (cpu_group / "cpu.max").write_text("70000 100000")
    else:
        (cpu_group / "cpu.cfs_quota_us").write_text("70000")

    done = subprocess.run(
        ["sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(cpu_group), sys.executable, "-c", COUNT],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["1", "1"]


@pytest.fixture
def cpu_group() -> Iterator[Path]:
    """A new control group for CPU time, of the version that this machine has."""
    for parent in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        directory = parent / f"forkvm-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            directory.mkdir()
            if (directory / "cpu.max").exists() or (directory / "cpu.cfs_quota_us").exists():
                break
            directory.rmdir()
    else:
        pytest.skip("no control group for CPU time can be made here")
    yield directory
    directory.rmdir()


def test_pool_has_one_process_per_cpu_unless_configured() -> None:
    assert make_app(read_settings()).conf.worker_concurrency == available_cpus()
    assert make_app(read_settings(concurrency="7")).conf.worker_concurrency == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("CONCURRENCY", "0"), ("CONCURRENCY", "two"), ("NAME", "a b"), ("NAME", "a@b"), ("NAME", "a" * 65)],
)
def test_invalid_concurrency_and_name_are_refused(name: str, value: str) -> None:
    with pytest.raises(BadSettings, match=f"^FORKVM_{name}: "):
        read_settings(**{name.lower(): value})


def test_node_has_the_configured_name_and_a_second_node_gets_another() -> None:
    name = f"rack-7-{os.getpid()}"

    assert node_name(name, "host") == f"{name}@host"
    second, third = node_name(name, "host"), node_name(name, "host")

    assert second.startswith(f"{name}-")
    assert second.endswith("@host")
    assert len({second, third, f"{name}@host"}) == 3


def test_node_without_a_configured_name_gets_a_unique_one() -> None:
    first, second = node_name("", "host"), node_name("", "host")

    assert first.startswith("forkvm-")
    assert first != second


def test_name_is_free_again_when_its_process_has_ended() -> None:
    name = f"rack-8-{os.getpid()}"
    ask = [sys.executable, "-c", f"from worker.runtime.node_name import node_name; print(node_name({name!r}, 'host'))"]

    answers = [subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]

    assert answers == [f"{name}@host"] * 2
