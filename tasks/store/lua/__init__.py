"""The Lua scripts that the store runs in Redis, and their loader.

A script is one command: no other client's command runs in between. Each is in a file of its own, whose comment says
what it does. Its first two statements give names to its keys and arguments; the loader reads the names from there, so
that Python passes them by name:

    local result_key, state_key = unpack(KEYS)
    local job_id, ttl = unpack(ARGV)

In a script that takes further ones by position, `unpack(KEYS, 1, 2)` limits the names to the first.

When Redis is full, it refuses the first write of a script. The first write is therefore a `redis.pcall`, and its error
is returned from the code OOM on: Redis before version 7 puts the place in the script before the code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from tasks.store.redis_errors import is_refused

#: Where an error of a script says that it happened, and the command there.
_LINE = re.compile(r"@user_script: ?(\d+)")
_CALL = re.compile(r"redis\.p?call\('(\w+)'")
_NAMES = re.compile(r"^local ([\w, ]+) = unpack\((KEYS|ARGV)(?:, 1, \d+)?\)$", re.MULTILINE)

#: What can be sent to Redis.
Value = str | bytes | int | float


class Script:
    """The script in the file `{name}.lua`. Nothing is read before the first call."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def text(self) -> str:
        """The script as Redis gets it."""
        return Path(__file__).with_name(f"{self.name}.lua").read_text(encoding="ascii")

    @cached_property
    def _sha(self) -> str:
        return hashlib.sha1(self.text.encode("ascii")).hexdigest()

    @cached_property
    def _names(self) -> tuple[list[str], list[str]]:
        """The names of the keys and of the arguments."""
        found = {kind: names.split(", ") for names, kind in _NAMES.findall(self.text)}
        return found.get("KEYS", []), found.get("ARGV", [])

    def run(
        self, redis: Redis, *, more_keys: Iterable[str] = (), more_args: Iterable[Value] = (), **values: Value
    ) -> Any:
        """Run the script with its keys and arguments by name; further ones follow by position.

        Redis keeps a script under its digest until it restarts, so its text is sent only when Redis does not know it.
        Raises RedisError, and TypeError for a name that is missing or unknown.
        """
        names, arguments = self._names
        if values.keys() != {*names, *arguments}:
            raise TypeError(f"{self.name}.lua takes {', '.join((*names, *arguments))}; given: {', '.join(values)}")
        keys = [values[name] for name in names]
        keys.extend(more_keys)
        sent = [*keys, *(values[name] for name in arguments), *more_args]
        client: Any = redis
        try:
            try:
                return client.evalsha(self._sha, len(keys), *sent)
            except NoScriptError:
                client.script_load(self.text)
                return client.evalsha(self._sha, len(keys), *sent)
        except ResponseError as error:
            raise self._named(error) from None

    def _named(self, error: ResponseError) -> ResponseError:
        """The error of a script. If Redis refused a command to its user, it names that, which Redis 7.0 does not."""
        line = _LINE.search(str(error))
        if line is None or not is_refused(error):
            return error
        call = _CALL.search(self.text.splitlines()[int(line[1]) - 1])
        command = f"the '{call[1].lower()}' command" if call is not None else "a command"
        return NoPermissionError(f"this user has no permissions to run {command} on its key (in {self.name}.lua)")


CANCEL = Script("cancel")
CLAIM = Script("claim")
END_BATCH = Script("end_batch")
EXPIRE_FORKS = Script("expire_forks")
FREE_FORK_IDS = Script("free_fork_ids")
GIVE_BACK = Script("give_back")
PUT_BACK = Script("put_back")
SET_STATE = Script("set_state")
STORE_OUTCOMES = Script("store_outcomes")
STORE_RESULT = Script("store_result")
TAKE_MESSAGES = Script("take_messages")
UNACKED_MESSAGES = Script("unacked_messages")
