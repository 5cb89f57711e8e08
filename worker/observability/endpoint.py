"""The endpoint of a worker with `FORKVM_HTTP`: metrics and health."""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus
from threading import Timer
from typing import Any

from kombu.exceptions import OperationalError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from redis.exceptions import RedisError

from worker.observability.consumer import observe_consumer
from worker.observability.gauges import Gauges, RedisReader, RootReader
from worker.observability.health import Health
from worker.observability.http_server import Answer, HttpServer, text
from worker.observability.metrics import Metrics
from worker.observability.readings import Reading
from worker.observability.reports import Report

#: When the first page is written, in seconds: the values on it should have been read by then.
_FIRST_PAGE_SECONDS = 0.5

log = logging.getLogger(__name__)


class Endpoint:
    """The endpoint of one worker. Make it before the pool processes are forked."""

    def __init__(self, app: Any, host: str, port: int, roots: tuple[str, ...]) -> None:
        """Listen. Raises OSError if the address cannot be used."""
        self._server = HttpServer(host, port)
        consumer = observe_consumer(app)
        self._root_readers = [RootReader(root) for root in roots]
        self._redis = Reading("redis", RedisReader(app), RedisError, OperationalError, OSError)
        self._roots = {reader.root: Reading(reader.root, reader, OSError) for reader in self._root_readers}
        self._metrics = Metrics()
        self._metrics.registry.register(Gauges(consumer, self._redis, self._roots))
        # A reading too. The page takes 1 ms of computing, but often 80 ms where the consumer loop is busy in the same
        # interpreter: too long for a request. And written each second, it would take ten times what the others do.
        self._page = Reading("metrics", partial(generate_latest, self._metrics.registry))
        self._health = Health(consumer, self._redis, self._roots)

    def start(self) -> None:
        """Start to read and to answer. Call this in the process that consumes, once logging is set up."""
        self._redis.start()
        for root in self._roots.values():
            root.start()
        Timer(_FIRST_PAGE_SECONDS, self._page.start).start()
        self._server.start({"/metrics": self._get_metrics, "/livez": self._get_livez, "/readyz": self._get_readyz})
        log.info("serving /metrics, /livez and /readyz at http://%s", self._server.address)

    def take(self, report: Report) -> None:
        """Take a report of one of the worker's processes."""
        kind = report[0]
        if kind == "parent":
            for reader in self._root_readers:
                reader.add(report[1])
        elif kind != "span":
            self._metrics.count(report)

    def _get_metrics(self, accept: str) -> Answer:
        page = self._page.value()
        if page is None:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, ["the first page is being written"])
        return Answer(HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, page)

    def _get_livez(self, accept: str) -> Answer:
        return _probe("alive", self._health.why_not_alive())

    def _get_readyz(self, accept: str) -> Answer:
        return _probe("ready", self._health.why_not_ready())


def _probe(good: str, wrong: list[str]) -> Answer:
    return text(HTTPStatus.SERVICE_UNAVAILABLE, wrong) if wrong else text(HTTPStatus.OK, [good])
