"""The HTTP listener: its responses, slow clients, and processes that are forked beside it."""

from __future__ import annotations

import os
import socket
import urllib.request
from http import HTTPStatus
from urllib.error import HTTPError

import pytest

from worker.observability.http_server import HttpServer, text
from worker.settings import read_address


@pytest.fixture
def server() -> HttpServer:
    server = HttpServer("127.0.0.1", 0)
    server.start({"/livez": lambda accept: text(HTTPStatus.OK, [f"alive {accept}"])})
    return server


def _get(server: HttpServer, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{server.address}{path}", method=method, headers={"Accept": "text/plain"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_serves_its_paths_and_no_others(server: HttpServer) -> None:
    assert _get(server, "/livez?verbose") == (200, "alive text/plain\n")
    assert _get(server, "/livez", "HEAD") == (200, "")
    assert _get(server, "/") == (404, "not found; there are /metrics, /livez and /readyz\n")
    assert _get(server, "/livez", "DELETE")[0] == 501


def test_a_client_that_sends_nothing_blocks_no_other(server: HttpServer) -> None:
    with socket.create_connection(read_address(server.address)):
        assert _get(server, "/livez")[0] == 200


def test_a_forked_process_does_not_inherit_the_listener(server: HttpServer) -> None:
    def listening() -> bool:
        with open("/proc/net/tcp", encoding="ascii") as table:
            rows = [line.split() for line in table]
        port = f"{read_address(server.address)[1]:04X}"
        inodes = {row[9] for row in rows if row[1].endswith(f":{port}") and row[3] == "0A"}
        links = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
        return any(f"socket:[{inode}]" in links for inode in inodes)

    assert listening()
    child = os.fork()
    if child == 0:
        os._exit(int(listening()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_an_address_that_is_in_use_is_an_error(server: HttpServer) -> None:
    with pytest.raises(OSError, match="in use"):
        HttpServer(*read_address(server.address))


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1:9440", ("127.0.0.1", 9440)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_addresses(value: str, address: tuple[str, int]) -> None:
    assert read_address(value) == address


@pytest.mark.parametrize("value", ["9440", ":9440", "host", "host:", "host:65536", "host:-1", "::1:9440", "host:٣"])
def test_anything_else_is_not_an_address(value: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        read_address(value)
