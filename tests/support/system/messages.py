"""Raw messages, as Redis stores them, to deliver them again."""

from __future__ import annotations

import ast
import json
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from tasks.names import SWEEP_TASK
from tests.fixtures.redis_server import RedisServer
from tests.support.system.scheduler import QUEUES

#: One argument in a line of MONITOR: quoted and escaped by sdscatrepr (sds.c), whose escapes are also valid in Python.
_ARGUMENT = re.compile(rb'"(?:[^"\\]|\\.)*"')


class Message(NamedTuple):
    """One message in one queue."""

    queue: str
    raw: bytes

    @property
    def task(self) -> str:
        return str(json.loads(self.raw)["headers"]["task"])

    @property
    def task_id(self) -> str:
        return str(json.loads(self.raw)["headers"]["id"])

    @property
    def delivery_tag(self) -> str:
        return str(json.loads(self.raw)["properties"]["delivery_tag"])


class Recorder:
    """Records every message that is put into our queues, except sweeps, which belong to no fork.

    Each new one is passed to `on_message` at once. Reads the server's MONITOR stream on its own connection: a message
    that a worker takes within a millisecond is in no list and, once acknowledged, in no hash.
    """

    def __init__(self, server: RedisServer, on_message: Callable[[Message], None] = lambda message: None) -> None:
        self.messages: list[Message] = []
        self._known: set[bytes] = set()
        self._on_message = on_message
        self._client = server.client(decode_responses=False)
        self._connection = self._client.connection_pool.get_connection()
        self._thread = threading.Thread(target=self._read, name="recorder", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> Recorder:
        self._connection.send_command("MONITOR")  # type: ignore[no-untyped-call]
        assert self._connection.read_response() == b"OK"
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.set("recorder:end", "1", ex=60)  # the thread sees it after everything that came before it
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._connection.disconnect()  # type: ignore[no-untyped-call]
        self._client.close()
        if self._error is not None:
            raise self._error

    def of_task(self, task: str) -> list[Message]:
        return [message for message in self.messages if message.task == task]

    def _read(self) -> None:
        try:
            while True:
                line = self._connection.read_response(disable_decoding=True)
                name, *arguments = (ast.literal_eval("b" + part.decode()) for part in _ARGUMENT.findall(line))
                if name == b"SET" and arguments[0] == b"recorder:end":
                    return
                if name.upper() in (b"LPUSH", b"RPUSH") and arguments[0].decode() in QUEUES:
                    self._take(Message(arguments[0].decode(), arguments[1]))
        except BaseException as error:
            self._error = error

    def _take(self, message: Message) -> None:
        if message.raw not in self._known and message.task != SWEEP_TASK:
            self._known.add(message.raw)
            self.messages.append(message)
            self._on_message(message)


def deliver(server: RedisServer, *messages: Message) -> None:
    """Put messages unchanged at the head of their queues."""
    with server.client(decode_responses=False) as client:
        for message in messages:
            client.rpush(message.queue, message.raw)
