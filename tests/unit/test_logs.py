"""The lines of a worker's log: their fields, and what they never contain."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timedelta
from typing import Any, cast

import pytest
from billiard import einfo
from celery import Celery
from redis.exceptions import NoPermissionError

from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkSpec, failed, succeeded
from tasks.copier.report import Totals
from tasks.fork_summary import log_end
from tasks.names import BATCH_TASK, FORK_TASK, job_fields
from worker.observability.fallbacks import FallbackLog
from worker.observability.logs import JsonLines, TextLines

SECRET = "a-guests-secret"


def _record(text: str, *args: object, error: bool = False, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("a.logger", logging.WARNING, __file__, 1, text, args, sys.exc_info() if error else None)
    vars(record).update(extra)
    return record


def _json(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonLines("rack-7").format(record)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_json_line_has_time_level_event_logger_and_domain() -> None:
    line = _json(_record("%d things", 3))

    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() == timedelta(0)
    assert line == {"level": "warning", "event": "3 things", "logger": "a.logger", "domain": "rack-7"}


@pytest.mark.parametrize("formatter", [JsonLines(""), TextLines()])
def test_an_exception_is_one_line_without_a_traceback(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("the first line\n  and the second")
    except ValueError:
        line = formatter.format(_record("it failed", error=True))

    assert "\n" not in line
    assert "ValueError: the first line and the second" in line
    assert "Traceback" not in line
    assert __file__ not in line


@pytest.mark.parametrize("formatter", [JsonLines(""), TextLines()])
def test_an_error_of_redis_that_celery_logs_by_its_repr_is_shown_with_its_text(formatter: logging.Formatter) -> None:
    line = formatter.format(_record("connection lost (%r)", NoPermissionError("no permissions to run 'brpop'")))

    assert line.count("no permissions to run 'brpop'") == 1


@pytest.mark.parametrize("formatter", [JsonLines(""), TextLines()])
def test_an_exception_of_a_pool_process_is_one_line_without_a_traceback(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("it ended")
    except ValueError:
        error = cast(Any, einfo).ExceptionInfo().exception
    record = _record("it failed")
    record.exc_info = (type(error), error, None)

    line = formatter.format(record)

    assert "ValueError: it ended" in line
    assert "Traceback" not in line


@pytest.mark.parametrize("formatter", [JsonLines(""), TextLines()])
@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@redis.example:6379/0",
        f"rediss://user:{SECRET}@redis.example/0",
        f"sentinel://:{SECRET}@one;sentinel://:{SECRET}@two",
        f"redis://user:p@{SECRET}@redis.example",
    ],
)
def test_secrets_in_urls_are_masked(formatter: logging.Formatter, url: str) -> None:
    try:
        raise OSError(f"cannot connect to {url}")
    except OSError:
        line = formatter.format(_record("connecting to %s, again", url, error=True))

    assert SECRET not in line
    assert "://***@" in line


def test_arguments_that_celery_attaches_to_its_records_are_not_written() -> None:
    data = {"id": "f.chunk.3", "name": "forkvm.chunk", "args": SECRET, "kwargs": SECRET}

    line = _json(_record("Task received", data=data, args_of_somebody=SECRET))

    assert SECRET not in json.dumps(line)
    assert (line["task_id"], line["fork_id"]) == ("f.chunk.3", "f")


@pytest.mark.parametrize(
    ("task", "task_id", "fields"),
    [
        ("forkvm.fork", "a.chunk.1", {"fork_id": "a.chunk.1"}),
        ("forkvm.chunk", "a.chunk.1", {"fork_id": "a"}),
        ("forkvm.finish", "a", {"fork_id": "a"}),
        ("forkvm.campaign", "c", {"campaign_id": "c"}),
        ("forkvm.batch", "c.batch.50", {"campaign_id": "c"}),
        ("forkvm.sweep", "s", {}),
    ],
)
def test_the_job_of_a_task_is_known_from_its_id(task: str, task_id: str, fields: dict[str, str]) -> None:
    assert job_fields(task, task_id) == {"task_id": task_id, **fields}


def test_a_line_about_another_fork_has_no_id_of_the_task_that_runs() -> None:
    """A task that has made its fork makes others that wait; see `tasks.fork.waiting_forks`."""
    app = Celery(set_as_current=False)

    @app.task(name="forkvm.fork", shared=False)
    def fork() -> list[dict[str, Any]]:
        return [_json(_record("a line")), _json(_record("the end", fork_id="waited"))]

    own, other = fork.apply(task_id="runs").get()

    assert (own["task_id"], own["fork_id"]) == ("runs", "runs")
    assert (other.get("task_id"), other["fork_id"]) == (None, "waited")


def test_the_end_of_a_fork_is_a_line_with_its_result(caplog: pytest.LogCaptureFixture) -> None:
    spec = ForkSpec(fork_id="f", source="/a", destination="/b\n", labels={"token": SECRET})
    totals = Totals(total=3, reflinked=2, copied=1, bytes_reflinked=100, bytes_copied=7)

    with caplog.at_level(logging.INFO):
        log_end(succeeded(spec, totals, 1, Clock(spec.started)))
        log_end(failed(spec, ForkError(Code.NO_SPACE, "full", "/b"), Totals(), 1, Clock(spec.started)))
        log_end(succeeded(spec, totals, 1, Clock(spec.started)), "a campaign")

    good, bad = map(_json, caplog.records)  # those of campaigns have the level DEBUG
    assert good["event"].startswith(r"fork f succeeded: '/a' -> '/b\n', 3 entries, 7 bytes copied, in 0.0")
    assert (good["level"], good["fork_id"], good["outcome"]) == ("info", "f", "succeeded")
    assert (good["files"], good["bytes"]) == ({"reflink": 2, "copy": 1}, {"reflink": 100, "copy": 7})
    assert good["seconds"].keys() == {"queued", "plan", "copy", "publish", "total"}
    assert (bad["level"], bad["outcome"], bad["code"]) == ("info", "failed", "no_space")
    assert SECRET not in caplog.text


def test_the_end_of_a_campaigns_fork_is_a_line_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    spec = ForkSpec(fork_id="c.1", source="/a", destination="/b")

    with caplog.at_level(logging.DEBUG):
        log_end(succeeded(spec, Totals(), 1, Clock(spec.started)), "c")

    (line,) = map(_json, caplog.records)
    assert (line["level"], line["fork_id"], line["campaign_id"]) == ("debug", "c.1", "c")


def test_refused_reflinks_are_logged_once_for_each_pair_of_filesystems(caplog: pytest.LogCaptureFixture) -> None:
    fallbacks = FallbackLog()
    for pair, *of_fork in (
        (("ext4", "ext4"), "fork-1", FORK_TASK, "fork-1"),
        (("ext4", "xfs"), "c.7", BATCH_TASK, "c.batch.0"),
        (("ext4", "ext4"), "fork-2", FORK_TASK, "fork-2"),
    ):
        fallbacks.take(["fallback", 18, *pair, 1, *of_fork])
        fallbacks.take(["takeover"])

    assert [message[:60] for message in caplog.messages] == [
        "files are copied, not reflinked, from ext4 to ext4: the kern",
        "files are copied, not reflinked, from ext4 to xfs: the kerne",
    ]
    ids = [{name: line[name] for name in line if name.endswith("_id")} for line in map(_json, caplog.records)]
    assert ids == [
        {"fork_id": "fork-1", "task_id": "fork-1"},
        {"fork_id": "c.7", "campaign_id": "c", "task_id": "c.batch.0"},
    ]
