"""The FileResults of forks, in pages of JSON that is compressed with zlib.

Each part of a fork (`plan`, a chunk's number, `close`) has its own pages, and a hash has their counts. A fork that has
one page and no parts, as most have, has one key instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from tasks.copier.progress import Cancellation
from tasks.copier.report import FileResult, unpack_pages
from tasks.store import keys
from tasks.store.connection import Connection

#: The positions of the parts without a number among those with one.
_POSITIONS = {"plan": 0, "close": 1_000_000}


@dataclass(frozen=True)
class Pages:
    """The pages of all forks. Each method raises RedisError; OutOfMemoryError when Redis is full."""

    connection: Connection

    def store(self, fork_id: str, pages_by_part: dict[str, list[bytes]], *, replace_all: bool = False) -> Cancellation:
        """Store the pages of parts of a fork, in place of the earlier ones of these parts.

        `replace_all`: in place of those of all parts, which belong to an earlier attempt. Returns whether the
        cancellation of the fork was requested, or the fork has ended in another process: the caller is to give it up.
        That saves a round trip.
        """
        counts, ttl = keys.PAGES.of(fork_id), self.connection.open_expires

        def write() -> Cancellation:
            with self.connection.redis.pipeline(transaction=True) as pipe:
                if replace_all:
                    pipe.delete(counts, keys.ONLY_PAGE.of(fork_id))
                for part, pages in pages_by_part.items():
                    for number, page in enumerate(pages):
                        pipe.set(keys.page_key(fork_id, part, number), page, ex=ttl)
                    pipe.hset(counts, part, str(len(pages)))
                pipe.expire(counts, ttl)
                pipe.exists(*_reasons_to_end(fork_id))
                return Cancellation.of(pipe.execute()[-1])

        return self.connection.ask(write)

    def store_all(self, pages: Mapping[str, list[bytes]]) -> list[Cancellation]:
        """As `store`, for forks without parts, in place of all that earlier attempts stored; pages by the fork's id.

        Forks of one page each, as most have, take one round trip together.
        """
        single = {fork_id: its[0] for fork_id, its in pages.items() if len(its) == 1}
        stored = self.connection.ask(lambda: self._store_single(single)) if single else {}
        return [
            stored[fork_id] if fork_id in stored else self.store(fork_id, {"0": its}, replace_all=True)
            for fork_id, its in pages.items()
        ]

    def _store_single(self, pages: Mapping[str, bytes]) -> dict[str, Cancellation]:
        parts = [keys.PAGES.of(fork_id) for fork_id in pages]
        with self.connection.redis.pipeline(transaction=False) as pipe:
            for fork_id, page in pages.items():
                pipe.set(keys.ONLY_PAGE.of(fork_id), page, ex=self.connection.expires)
            pipe.exists(*parts, *(key for fork_id in pages for key in _reasons_to_end(fork_id)))
            if not pipe.execute()[-1]:  # nearly always
                return dict.fromkeys(pages, Cancellation.NOT_REQUESTED)
            pipe.delete(*parts)
            for fork_id in pages:
                pipe.exists(*_reasons_to_end(fork_id))
            return dict(zip(pages, map(Cancellation.of, pipe.execute()[1:]), strict=True))

    def missing(self, fork_id: str, parts: Iterable[str]) -> list[str]:
        """Those of `parts` of a fork without stored pages."""
        stored = self._counts(fork_id)
        return [part for part in parts if part not in stored]

    def files(self, fork_id: str) -> Iterator[FileResult]:
        """Yield the FileResults that are there so far, in the order of the parts. Reads a page at a time."""
        redis = self.connection.redis
        counts = self._counts(fork_id)
        wanted = [
            keys.page_key(fork_id, part, number)
            for part in sorted(counts, key=_position)
            for number in range(counts[part])
        ]
        for key in wanted or [keys.ONLY_PAGE.of(fork_id)]:
            page = cast("bytes | None", redis.get(key))
            if page is not None:
                yield from unpack_pages([page])

    def _counts(self, fork_id: str) -> dict[str, int]:
        """How many pages each part has."""
        key = keys.PAGES.of(fork_id)
        found = cast("dict[bytes, bytes]", self.connection.ask(lambda: self.connection.redis.hgetall(key)))
        return {part.decode(): int(count) for part, count in found.items()}


def _reasons_to_end(fork_id: str) -> tuple[str, str]:
    """The keys of a fork: one exists if it was cancelled, one if it has ended."""
    return keys.CANCEL.of(fork_id), keys.RESULT.of(fork_id)


def _position(part: str) -> int:
    """The position of a part among the parts of a fork."""
    return _POSITIONS[part] if part in _POSITIONS else int(part) + 1
