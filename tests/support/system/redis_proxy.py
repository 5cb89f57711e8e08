"""A proxy for Redis' socket that can delay connections, break them off in the middle of a reply, or close them all."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_CHUNK = 65536
#: The timeout after which a waiting thread checks whether the proxy is closed, in seconds.
_POLL_SECONDS = 0.2


class Proxy:
    """Passes bytes between clients and a server, both on unix sockets, until a fault is injected."""

    def __init__(self, server: Path) -> None:
        self.socket = server.with_name("proxy.sock")
        self._server = server
        self._listener = socket.socket(socket.AF_UNIX)
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        #: Seconds by which everything is delayed.
        self.delay = 0.0
        #: Connections cut so far.
        self.cuts = 0
        self._halve = False
        #: Connections that pass nothing on any more, without being closed.
        self._silent: set[tuple[socket.socket, socket.socket]] = set()
        #: Whether new connections are silent too.
        self.is_cut_off = False
        self._flowing = threading.Event()
        self._flowing.set()

    def __enter__(self) -> Proxy:
        self._listener.bind(str(self.socket))
        self._listener.listen(64)
        self._listener.settimeout(_POLL_SECONDS)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._acceptor.join()
        self._flowing.set()
        self.cut()
        self._listener.close()
        self.socket.unlink()

    def cut(self) -> None:
        """Close every current connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self._end(pair)

    def silence(self) -> None:
        """All current connections pass nothing on any more, without being closed, as after a NAT timeout."""
        with self._lock:
            self._silent.update(self._pairs)

    def hold(self) -> None:
        """Keep all bytes of all connections, including new ones, until `release`."""
        self._flowing.clear()

    def release(self) -> None:
        """Pass on the kept bytes, and all that follow."""
        self._flowing.set()

    def halve(self) -> None:
        """Close the next connection that carries a reply to a client, after half of the reply."""
        self._halve = True

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self.cuts += 1
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._server))
            except OSError:  # Redis is down, so the proxy refuses too
                client.close()
                server.close()
                continue
            pair = (client, server)
            with self._lock:
                self._pairs.append(pair)
            threads = [
                threading.Thread(target=self._pass_on, args=(pair, client, server, False), daemon=True),
                threading.Thread(target=self._pass_on, args=(pair, server, client, True), daemon=True),
            ]
            for thread in threads:
                thread.start()
            threading.Thread(target=self._close, args=(pair, threads), daemon=True).start()

    def _pass_on(
        self, pair: tuple[socket.socket, socket.socket], here: socket.socket, there: socket.socket, to_client: bool
    ) -> None:
        with suppress(OSError):
            while data := here.recv(_CHUNK):
                if self.is_cut_off or pair in self._silent:
                    continue
                self._flowing.wait()
                time.sleep(self.delay)
                if to_client and self._halve and len(data) > 1:
                    self._halve = False
                    there.sendall(data[: len(data) // 2])
                    break
                there.sendall(data)
        self._end(pair)

    def _close(self, pair: tuple[socket.socket, socket.socket], threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.join()
        with self._lock, suppress(ValueError):
            self._pairs.remove(pair)
        for end in pair:
            end.close()
