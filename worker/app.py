"""The Celery app of a worker: `celery -A worker.app worker -Q forkvm`."""

from __future__ import annotations

from worker.own_packages import prefer_own_packages

prefer_own_packages()  # again: after it imports `worker`, `celery -A` puts the working directory first

import gc
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from celery import bootsteps, signals
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle

from tasks.copier.counted import counted
from tasks.copier.io_priority import use_io_priority
from tasks.delivery.backend import results_of
from tasks.names import inner_queues
from worker.checks.shared_filesystems import LocksNotShared, place_markers
from worker.checks.startup import Unusable, check_host, check_redis
from worker.exit_codes import BAD_CALL
from worker.observability.logs import (
    ignore_warnings_of_celery,
    log_words_of_shutdown,
    set_up_logging,
    style_for,
)
from worker.observability.service import observe
from worker.runtime.message_filter import install_message_filter
from worker.runtime.node_name import node_name
from worker.runtime.patches import (
    ignore_soft_time_limits,
    patch_close_of_channels,
    patch_closed_channels,
    patch_connections_of_children,
    patch_end_of_children,
    patch_heartbeat_events,
    patch_search_for_lost_messages,
    patch_unacked_messages,
    report_expired_leases,
)
from worker.runtime.remote_control import register_remote_control
from worker.runtime.worker_app import make_worker_app
from worker.settings import NO_ROOTS, BadSettings, Settings, read_settings
from worker.tls import refuse_untrusted

#: Writable even where no filesystem is (systemd's ProtectSystem=strict, a read-only container).
_SHARED_MEMORY = "/dev/shm"
log = logging.getLogger(__name__)

#: This worker's markers on filesystems that other hosts may use, and the warnings to log when logging is set up.
_markers = ExitStack()
_warnings: list[str] = []


def _settings() -> Settings:
    try:
        return read_settings()
    except BadSettings as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    """Print one line and exit with the code of a bad call."""
    print(f"forkvm: {message}", file=sys.stderr)
    sys.exit(BAD_CALL)


@signals.celeryd_init.connect
def _name_the_node(instance: Any = None, **_: Any) -> None:
    """Replace Celery's default node name, which all workers of a host share. The option `-n` wins over FORKVM_NAME."""
    host = socket.gethostname()
    if instance is not None and instance.hostname == f"celery@{host}":
        instance.hostname = node_name(_settings().name, host)


@signals.celeryd_init.connect
def _require_roots(conf: Any = None, **_: Any) -> None:
    if not _settings().roots:
        _refuse(NO_ROOTS)


@signals.celeryd_init.connect
def _require_a_temporary_directory(**_: Any) -> None:
    """Use /dev/shm for temporary files if no usual directory is writable: billiard needs them for shared memory."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(_SHARED_MEMORY, os.W_OK):
            _refuse("no temporary directory is writable: set TMPDIR to a writable one")
        tempfile.tempdir = _SHARED_MEMORY


@signals.celeryd_init.connect
def _refuse_an_untrusted_broker(**_: Any) -> None:
    refuse_untrusted(app, _settings().broker)


@signals.celeryd_init.connect
def _require_shared_locks(**_: Any) -> None:
    try:
        _warnings.extend(place_markers(_settings().roots, _markers))
    except LocksNotShared as error:
        _markers.close()
        sys.exit(f"forkvm: {error}")


@signals.celeryd_init.connect
def _require_a_usable_host(**_: Any) -> None:
    try:
        _warnings.extend(check_host(_settings()))
    except Unusable as error:
        _markers.close()
        sys.exit(f"forkvm: {error}")


@signals.celeryd_after_setup.connect
def _log_warnings(**_: Any) -> None:
    for warning in (*_warnings, *check_redis(_settings(), results_of(app, patient=False))):
        log.warning("%s", warning)


@signals.worker_shutdown.connect
def _remove_markers(**_: Any) -> None:
    _markers.close()


@signals.celeryd_init.connect
def _require_heartbeat_file(**_: Any) -> None:
    """Refuse to start if the heartbeat file cannot be written: a health check would kill the worker."""
    path = _settings().heartbeat_file
    if path:
        try:
            Path(path).touch()
        except OSError as error:
            _refuse(f"FORKVM_HEARTBEAT_FILE: {path} cannot be written: {error.strerror}")


@signals.celeryd_init.connect
@signals.worker_process_init.connect
def _set_io_priority(**_: Any) -> None:
    """In the main process to refuse a wrong setting at once, and in each child, since a thread may have started it."""
    try:
        use_io_priority(_settings().io_priority)
    except OSError as error:
        _refuse(f"FORKVM_IO_PRIORITY: it cannot be set: {error.strerror}")


@signals.celeryd_init.connect
def _ignore_other_workers(**_: Any) -> None:
    """Do not exchange revoked tasks and events with other workers.

    Celery exchanges them with every worker on the Redis database, including those of other applications.
    """
    Mingle.compatible_transports = Gossip.compatible_transports = set()


@signals.celeryd_init.connect
def _patch_kombu(**_: Any) -> None:
    patch_closed_channels()
    patch_close_of_channels()
    patch_connections_of_children()
    patch_unacked_messages()
    patch_search_for_lost_messages()
    report_expired_leases()


@signals.celeryd_init.connect
def _patch_celery(**_: Any) -> None:
    patch_end_of_children()
    patch_heartbeat_events()
    ignore_soft_time_limits()
    register_remote_control()


@signals.setup_logging.connect
def _set_up_logging(loglevel: Any = None, logfile: str | None = None, **_: Any) -> None:
    """Replace Celery's own set-up. FORKVM_LOG_LEVEL takes precedence over Celery's option."""
    settings = _settings()
    set_up_logging(settings.log, settings.log_level or loglevel, settings.domain, logfile)


@signals.celeryd_init.connect
def _print_only_lines_of_the_log(instance: Any = None, **_: Any) -> None:
    """Print no banner into a log of JSON lines, and let the words of a shutdown be such a line."""
    ignore_warnings_of_celery()
    if instance is not None and (_settings().log or style_for(sys.stderr)) == "json":
        instance.quiet = True
        log_words_of_shutdown()


@signals.celeryd_init.connect
def _observe(**_: Any) -> None:
    settings = _settings()
    try:
        start = observe(app, settings)
    except OSError as error:
        host, port = settings.http or ("", 0)
        _refuse(f"FORKVM_HTTP: cannot listen at {host}:{port}: {error.strerror}")
    app.steps["worker"].add(type("Observe", (_StepAfterPool,), {"begin": staticmethod(start)}))


class _StepAfterPool(bootsteps.StartStopStep):
    """Starts the threads that observe the worker, once its pool processes are forked.

    A process that is forked while another thread imports a module waits for that import without end if it needs the
    module itself.
    """

    requires = ("celery.worker.components:Pool",)
    begin: Callable[[], None]

    def start(self, parent: Any) -> None:
        """Called when the pool has started, before the worker connects to Redis."""
        self.begin()


@signals.celeryd_after_setup.connect
def _freeze_objects(**_: Any) -> None:
    """Leave the objects of the program out of garbage collection, in this process and in those that it forks.

    There are 90,000 of them, so a full collection stops a process for 60 to 140 ms, and its fork with it. A child that
    collects also copies the pages that hold them (the documentation of `gc.freeze`).
    """
    gc.freeze()


@signals.celeryd_after_setup.connect
def _log_the_start(instance: Any = None, **_: Any) -> None:
    ignore_warnings_of_celery()  # again: Celery's set-up of logging shows them
    if instance is not None and instance.quiet:
        queues = ", ".join(sorted(instance.app.amqp.queues.consume_from))
        children = counted(instance.concurrency, "pool process", "pool processes")
        log.info("forkvm %s starts with %s for the queues %s", version("forkvm"), children, queues)


@signals.celeryd_init.connect
def _install_message_filter(**_: Any) -> None:
    install_message_filter(app)


@signals.celeryd_after_setup.connect
def _consume_inner_queues(instance: Any = None, **_: Any) -> None:
    """Consume the inner queues of each domain queue too."""
    queues = instance.app.amqp.queues
    for name in list(queues.consume_from):
        for inner in inner_queues(name):
            queues.select_add(inner)


app = make_worker_app(_settings())
