"""Arbitrary messages in the queue: they are refused with a line in the log, and the worker continues to serve."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fixtures.processes import StartWorker, wait_until
from tests.support.guests import make_guest
from tests.support.system.scheduler import QUEUE, QUEUES, Scheduler
from tests.support.system.systems import System

#: The number of messages made at random from one seed; each kind occurs many times.
COUNT = 2000
SEED = 5
#: The message filter's line in the log.
_REFUSAL = re.compile(r"a message in the queue \S+ was refused: \S")


class _Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def _message(task: str, body: Any, fork_id: str) -> dict[str, Any]:
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": fork_id, "root_id": fork_id, "parent_id": None},
        "properties": {
            "correlation_id": fork_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


class HostileMessages:
    """Makes messages that no client should send, from one seed."""

    def __init__(self, directory: Path) -> None:
        self._rng = random.Random(SEED)
        self._directory = directory
        self.exploit_file = directory / "trap"

    def messages(self) -> tuple[list[bytes], int]:
        """All messages, and the number of those that the filter must refuse. It may accept some of the others."""
        always_refused: list[Callable[[], bytes]] = [
            self._noise,
            self._no_message,
            self._pickled,
            self._deep,
            self._wrong_type,
            self._old_protocol,
        ]
        sometimes_refused: list[Callable[[], bytes]] = [
            self._corrupted,
            self._field_missing,
            self._field_replaced,
            self._wrong_arguments,
            self._strange_id,
        ]
        chosen = [self._rng.choice([*always_refused, *sometimes_refused]) for _ in range(COUNT)]
        made = [make() for make in chosen]
        return [*made, self._huge()], sum(make in always_refused for make in chosen) + 1

    def _good(self) -> dict[str, Any]:
        destination = str(self._directory / "nowhere" / "b")
        arguments: dict[str, dict[str, Any]] = {
            "forkvm.fork": {"request": {"source": str(self._directory / "a"), "destination": destination}},
            "forkvm.chunk": {"fork_id": "x", "destination": destination, "number": 0},
            "forkvm.finish": {"destination": "/"},
            "forkvm.sweep": {"every": 5},
            "forkvm.campaign": {"request": {"source": str(self._directory / "a"), "destinations": [destination]}},
            "forkvm.batch": {"campaign_id": "x", "home": destination, "first": 0},
            "forkvm.conclude": {"home": destination},
        }
        task = self._rng.choice(sorted(arguments))
        return _message(task, [[], arguments[task], {}], f"hostile-{self._rng.randrange(10**9)}")

    def _any(self) -> Any:
        return self._rng.choice(
            [
                None,
                True,
                0,
                -1,
                2**63,
                1e308,
                "",
                "\0",
                "\ud800",
                "x" * 5000,
                [],
                [[]],
                {},
                {"a": {}},
                "../..",
                "base64",
            ]
        )

    def _noise(self) -> bytes:
        return self._rng.randbytes(self._rng.randrange(1, 200))

    def _no_message(self) -> bytes:
        return json.dumps(self._any()).encode()

    def _corrupted(self) -> bytes:
        """A valid message with some bytes changed or cut off."""
        raw = bytearray(json.dumps(self._good()).encode())
        for _ in range(self._rng.randrange(1, 4)):
            raw[self._rng.randrange(len(raw))] = self._rng.randrange(256)
        return bytes(raw[: self._rng.choice([len(raw), self._rng.randrange(len(raw))])])

    def _field_missing(self) -> bytes:
        message = self._good()
        part: Any = self._rng.choice([message, message["headers"], message["properties"]])
        part.pop(self._rng.choice(sorted(part)))
        return json.dumps(message).encode()

    def _field_replaced(self) -> bytes:
        message = self._good()
        part: Any = self._rng.choice([message, message["headers"], message["properties"]])
        part[self._rng.choice(sorted(part))] = self._any()
        return json.dumps(message).encode()

    def _wrong_arguments(self) -> bytes:
        message = self._good()
        kwargs = {self._rng.choice(["self", "request", "fork_id", "task", "every", "\0", "x"]): self._any()}
        body = [self._rng.choice([[], [1], [None] * 5]), kwargs, {}]
        message["body"] = base64.b64encode(json.dumps(body).encode()).decode()
        return json.dumps(message).encode()

    def _body(self, body: bytes, content_type: str = "application/json", encoding: str = "utf-8") -> bytes:
        message = self._good() | {"content-type": content_type, "content-encoding": encoding}
        return json.dumps(message | {"body": base64.b64encode(body).decode()}).encode()

    def _pickled(self) -> bytes:
        exploit = pickle.dumps(([], {"request": _Exploit(self.exploit_file)}, {}))
        kind = self._rng.choice(
            ["application/x-python-serialize", "application/json", "application/data", "text/plain"]
        )
        return self._body(exploit, kind, self._rng.choice(["binary", "utf-8", "rot13"]))

    def _deep(self) -> bytes:
        depth = self._rng.choice([100, 5000, 100_000])
        return self._body(b"[" * depth + b"]" * depth)

    def _wrong_type(self) -> bytes:
        kind = self._rng.choice(["", "application/x-yaml", "application/x-msgpack", "image/png", "application/json\0"])
        return self._body(b"[[], {}, {}]", kind, self._rng.choice(["utf-8", "utf-99", "base64"]))

    def _old_protocol(self) -> bytes:
        """Protocol 1 has all fields in its body; the other headers belong to no protocol."""
        body = {"task": "forkvm.fork", "id": "old", "args": [], "kwargs": self._any(), "eta": self._any()}
        message = self._good() | {"body": base64.b64encode(json.dumps(body).encode()).decode()}
        message["headers"] = self._rng.choice([{}, {"protocol": 7}, {"task": None}])
        return json.dumps(message).encode()

    def _strange_id(self) -> bytes:
        message = self._good()
        message["headers"]["id"] = self._any()
        message["headers"] |= {
            "eta": self._any(),
            "expires": self._any(),
            "timelimit": self._any(),
            "retries": self._any(),
        }
        return json.dumps(message).encode()

    def _huge(self) -> bytes:
        return self._body(b'[[], {"request": "' + b"x" * (128 << 20) + b'"}, {}]')


def test_hostile_messages_are_refused_and_the_worker_serves_the_next_job(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, workdir: Path
) -> None:
    # Given
    worker = start_worker(mounts, env={"FORKVM_VISIBILITY_TIMEOUT": "5"})
    system, scheduler = System(own_scheduler.server, worker, own_scheduler), own_scheduler
    make_guest(workdir / "a")
    hostile = HostileMessages(workdir)
    messages, certain = hostile.messages()

    # When
    for n, message in enumerate(messages):
        scheduler.redis.lpush(QUEUES[n % len(QUEUES)], message)

    # Then
    def taken() -> bool:
        return not worker.running or not any(scheduler.messages()[queue] for queue in QUEUES)

    wait_until(taken, "the end of the hostile messages", 120)
    assert worker.running, worker.output()[-3000:]
    sent = scheduler.send({"source": str(workdir / "a"), "destination": str(workdir / "b")})
    assert scheduler.wait(sent)["status"] == "succeeded"
    assert not hostile.exploit_file.exists()
    assert sorted(path.name for path in workdir.iterdir()) == ["a", "b"]
    log = worker.output()
    assert len(_REFUSAL.findall(log)) >= certain > COUNT // 3
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    system.assert_left_nothing_in(workdir)
    for key in [key for key in scheduler.redis.scan_iter() if scheduler.redis.ttl(key) == -1]:
        assert key.startswith(b"_kombu"), key
