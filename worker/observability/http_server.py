"""The listener of `FORKVM_HTTP`: `/metrics`, `/livez`, `/readyz`.

It runs in threads of the main process, apart from the consumer loop. A request waits for nothing: see `readings`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread
from typing import Any, NamedTuple

#: A client that is slower is disconnected, in seconds.
_CLIENT_SECONDS = 5.0
#: Most requests that are answered at once. A thread costs memory, and clients may be hostile.
_MOST_REQUESTS = 16


class Answer(NamedTuple):
    """The answer to a request."""

    status: HTTPStatus
    content_type: str
    body: bytes


#: An answer for each path, from the header `Accept`.
Routes = dict[str, Callable[[str], Answer]]


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._slots = BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, without HTTPServer's question to DNS for the host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, once one is free."""
        if not self._slots.acquire(timeout=_CLIENT_SECONDS):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that disconnects is no fault of the worker, and there is no other error."""


class HttpServer:
    """Listens from the start; answers once it is given its routes."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError if the address cannot be used."""
        self.routes: Routes = {}
        self._server = _Server((host, port), type("Handler", (_Handler,), {"routes": self.routes}))
        os.register_at_fork(after_in_child=self._server.socket.close)

    @property
    def address(self) -> str:
        """The address that it listens at, as HOST:PORT."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def start(self, routes: Routes) -> None:
        """Start to answer."""
        self.routes.update(routes)
        Thread(target=self._server.serve_forever, name="http", daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    routes: Routes
    timeout = _CLIENT_SECONDS
    server_version = "forkvm"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer GET."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer HEAD."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        route = self.routes.get(self.path.partition("?")[0], _not_found)
        status, content_type, body = route(self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes and scrapes come every few seconds."""


def text(status: HTTPStatus, lines: list[str]) -> Answer:
    """An answer in plain text."""
    body = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    return Answer(status, "text/plain; charset=utf-8", body)


def _not_found(accept: str) -> Answer:
    return text(HTTPStatus.NOT_FOUND, ["not found; there are /metrics, /livez and /readyz"])
