"""The log: one line for each record, as text or as JSON, also for Celery's own records.

A line has no traceback, no secret and no data of a guest. Of the fields that a record brings, only those named here are
written: Celery attaches the arguments of tasks to its own.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
from datetime import UTC, datetime
from typing import Any, TextIO, cast

from billiard import einfo
from celery._state import get_current_task
from celery.apps import worker as celery_worker
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning
from celery.utils.log import get_multiprocessing_logger
from pythonjsonlogger.json import JsonEncoder, JsonFormatter
from redis.exceptions import RedisError

from tasks.names import job_fields
from tasks.store.redis_errors import cause
from worker.settings import LogStyle

#: Fields of a record that are written.
_FIELDS = ("fork_id", "campaign_id", "task_id", "outcome", "code", "seconds", "files", "bytes")
#: User and password in a URL.
_USER_INFO = re.compile(r"(?<=://)[^\s/]*@")
#: Loggers of Celery that log each message twice, and the first lines of what is in them: one line of ours says more.
_OF_EACH_MESSAGE = ("celery.worker.strategy", "celery.app.trace")
#: Logs the arguments of each task at the level DEBUG.
_OF_ARGUMENTS = "celery.pool"
#: An exception whose text is the traceback of another one, its `exc`.
_WithTraceback: Any = cast(Any, einfo).ExceptionWithTraceback

log = logging.getLogger(__name__)


def set_up_logging(style: LogStyle | None, level: int | str, domain: str, file: str | None = None) -> None:
    """Log to `file`, or to stderr. Without a style, a terminal gets text and everything else JSON."""
    handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLines(domain) if (style or style_for(handler.stream)) == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    if not root.isEnabledFor(logging.DEBUG):
        for name in _OF_EACH_MESSAGE:
            logging.getLogger(name).setLevel(logging.WARNING)
    pool: Any = get_multiprocessing_logger()  # it passes nothing on to the root logger
    pool.handlers[:], pool.propagate = [handler], False
    pool.setLevel(logging.ERROR)
    logging.getLogger(_OF_ARGUMENTS).setLevel(logging.INFO)
    threading.excepthook = _log_end_of_thread


def style_for(stream: TextIO) -> LogStyle:
    """The style of a log that is written to `stream`, where none is set."""
    return "console" if stream.isatty() else "json"


def ignore_warnings_of_celery() -> None:
    """Ignore warnings of Celery that are wrong here: of root's rights, since only JSON is decoded, and of Celery 6."""
    for category in (SecurityWarning, CPendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


def log_words_of_shutdown() -> None:
    """Log what Celery prints on a signal."""
    module: Any = celery_worker
    module.safe_say = lambda text, *_: log.info("%s", text)


def _log_end_of_thread(args: threading.ExceptHookArgs) -> None:
    # Once the main thread has ended, nothing is wrong with another one. On SIGHUP, Celery then closes all files.
    if args.exc_value is not None and threading.main_thread().is_alive():
        name = "" if args.thread is None else args.thread.name
        log.critical("the thread %r ended", name, exc_info=args.exc_value)


class TextLines(logging.Formatter):
    """Text for a terminal: time, level, process, event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        error = _error(record)
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        head = f"[{time},{int(record.msecs):03}: {record.levelname}/{record.processName}]"
        return f"{head} {_event(record)}{f': {error}' if error else ''}"


class JsonLines(JsonFormatter):
    """JSON: `timestamp`, `level`, `event`, `logger`, and where known the ids of the job, and further fields."""

    def __init__(self, domain: str) -> None:
        encode = JsonEncoder().encode  # by default, each line makes an encoder of its own
        super().__init__(json_serializer=lambda line, **_: encode(line))
        self._domain = domain

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """Fill in the fields."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data["timestamp"] = moment.replace("+00:00", "Z")
        log_data["level"] = record.levelname.lower()
        log_data["event"] = _event(record)
        log_data["logger"] = record.name
        log_data["domain"] = self._domain
        log_data.update(_fields(record))
        error = _error(record)
        if error:
            log_data["error"] = error

    def formatException(self, ei: Any) -> str:
        """Nothing: see `_error`."""
        return ""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record, and the ids of the task that it is about, or that this process runs."""
    values = vars(record)
    own = {name: values[name] for name in _FIELDS if name in values}
    data, task = getattr(record, "data", None), cast(Any, get_current_task())
    ids: dict[str, str] = {}
    if isinstance(data, dict) and "id" in data and "name" in data:  # Celery's records about a task
        ids = job_fields(str(data["name"]), str(data["id"]))
    elif task is not None and task.request.id is not None:
        ids = job_fields(task.name, task.request.id)
    is_of_another = any(own.get(name, ids[name]) != ids[name] for name in ids)  # see `tasks.fork.waiting_forks`
    return own if is_of_another else ids | own


def _event(record: logging.LogRecord) -> str:
    """The message of a record. Celery logs the repr of an error of Redis, which lacks its text in redis-py 8."""
    text = record.getMessage()
    for value in record.args if isinstance(record.args, tuple) else ():
        if isinstance(value, RedisError) and (why := cause(value)) not in text:
            text += f": {why}"
    return _line(text)


def _error(record: logging.LogRecord) -> str:
    """The exception of a record in one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, _WithTraceback):
        error = error.exc
    return "" if error is None else _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    """The text in one line, without secrets."""
    if "\n" in text:
        text = " ".join(text.split())
    return _USER_INFO.sub("***@", text) if "://" in text else text
