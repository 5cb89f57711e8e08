"""Shared by all tests: fixture modules, hypothesis profiles, logs of failed tests, clean-up on SIGTERM."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from types import FrameType
from typing import NoReturn

import hypothesis
import pytest

from tests.support.outcome import CALL, LOGS
from tests.support.requirements import in_ci

pytest_plugins = (
    "tests.fixtures.filesystems",
    "tests.fixtures.fuse",
    "tests.fixtures.redis_server",
    "tests.fixtures.processes",
    "tests.fixtures.secure_redis",
    "tests.fixtures.sentinels",
    "tests.fixtures.scheduler",
)

#: The part of each log that is shown for a failed test.
_LOG_TAIL_BYTES = 20_000

# No deadline, since real filesystems vary in speed. In CI the examples are fixed, so that a failure is caused by the
# change and not by new random examples.
hypothesis.settings.register_profile("forkvm", deadline=None, print_blob=True, derandomize=in_ci())
hypothesis.settings.load_profile("forkvm")


def pytest_configure() -> None:
    # pytest tears down its fixtures after a KeyboardInterrupt; SIGTERM would end it at once.
    signal.signal(signal.SIGTERM, _interrupt)
    _restore_ignored_signals()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long tests run first. Otherwise they would start when most pytest-xdist processes have nothing left to do.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    # The collected tests are half a million objects. Each later gc.collect() would visit them, for 0.3 s.
    gc.collect()
    gc.freeze()


def _restore_ignored_signals() -> None:
    """Give signals that pytest was started to ignore their default handlers again.

    nohup ignores SIGHUP, and a shell without job control starts a command followed by `&` with SIGINT and SIGQUIT
    ignored. An ignored signal stays ignored across execve (signal(7)), so the programs that tests start and signal
    would ignore it too.
    """
    for number, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[LOGS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[CALL] = report
    if report.failed:
        for log in item.stash.get(LOGS, []):
            if log.exists():
                report.sections.append((f"{log.name}, its end", _tail(log)))
    return report


def _tail(log: os.PathLike[str]) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
