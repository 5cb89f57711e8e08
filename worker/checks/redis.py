"""The checks of `forkvm doctor` on the Redis of the settings. They never show its password."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from redis import Redis
from redis.exceptions import ConnectionError, RedisError, ResponseError, TimeoutError

from tasks.store.redis_errors import cause
from worker.checks.check import LOW_SHARE, Check
from worker.checks.redis_rights import rights_check
from worker.client import Client
from worker.redis_url import SENTINEL, SOCKET, RedisUrl, read_redis_url
from worker.settings import NoBroker, Settings

#: The oldest version with all commands that forkvm uses.
_OLDEST = (6, 2)
#: PINGs that are timed, and the time of one that is slow, in seconds.
_PINGS = 20
_SLOW_SECONDS = 0.005
#: A larger difference of clocks is a warning, in seconds.
_CLOCK_SECONDS = 1.0
#: Names of this host: no network is between.
_THIS_HOST = ("localhost", "127.0.0.1", "::1")


def redis_checks(settings: Settings) -> Iterator[Check]:
    """Check the broker's Redis, and the results' if it is another one. Raises NoBroker."""
    for url in dict.fromkeys((settings.broker_url, settings.result_backend or settings.broker_url)):
        read = read_redis_url(url)
        subject = f"Redis {read.shown()}"
        redis = Client(replace(settings, result_backend=url)).results.redis
        yield _connection(subject, read)
        try:
            yield from server_checks(subject, redis)
            yield _config(subject, redis)
            yield rights_check(subject, redis)
            yield from distance_checks(subject, redis, _PINGS)
        except (ConnectionError, TimeoutError) as error:
            what = "broker" if url == settings.broker_url else "result backend"
            raise NoBroker(f"no {what} at {read.shown()}: {error}") from None
        except RedisError as error:
            yield Check(subject, "bad", f"it refuses a command: {cause(error)}", "see its log and SECURITY.md")


def _connection(subject: str, url: RedisUrl) -> Check:
    """How Redis is reached. Only the host name shows whether a network is between."""
    if url.is_tls:
        return Check(subject, "ok", "reached over TLS, certificate and host name verified")
    if url.scheme == SOCKET:
        return Check(subject, "ok", "reached through a unix socket")
    if all(host in _THIS_HOST for host, _ in url.hosts):
        return Check(subject, "ok", "reached without TLS, on this host")
    if url.scheme == SENTINEL:
        return Check(subject, "warn", "reached over a network without TLS", "keep that network private")
    return Check(subject, "warn", "reached over a network without TLS", "use rediss://, see SECURITY.md")


def server_checks(subject: str, redis: Redis) -> Iterator[Check]:
    """Check what the server says of itself. Raises RedisError."""
    try:
        info = redis.info()
    except ResponseError:
        fix = "allow the command: +info, as for the user in SECURITY.md"
        yield Check(f"{subject}: settings", "warn", "unknown: INFO is not permitted", fix)
        return
    yield _version(subject, str(info.get("redis_version", "?")))
    if info.get("redis_mode") == "cluster":
        yield _cluster(subject)
    yield _role(subject, str(info.get("role", "?")), int(info.get("connected_slaves", 0)))
    yield _append_only(subject, info.get("aof_enabled"))
    yield _persistence(subject, info)
    yield _eviction(subject, str(info.get("maxmemory_policy", "?")))
    yield _memory(subject, int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))


def _version(subject: str, version: str) -> Check:
    parts = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if tuple(parts) < _OLDEST:
        return Check(f"{subject}: version", "bad", version, "run Redis 6.2 or newer")
    return Check(f"{subject}: version", "ok", version)


def _cluster(subject: str) -> Check:
    found = "cluster: it refuses commands with keys of different slots, so no fork is made"
    return Check(f"{subject}: mode", "bad", found, "run one Redis, or a master and replicas with sentinels")


def _role(subject: str, role: str, replicas: int) -> Check:
    if role != "master":
        fix = "name its master in the URL, or its sentinels with sentinel://"
        return Check(f"{subject}: role", "bad", f"{role}: it refuses writes, or loses them", fix)
    return Check(f"{subject}: role", "ok", f"master with {replicas} replicas")


def _persistence(subject: str, info: dict[str, Any]) -> Check:
    """Whether its last writes to the disk succeeded."""
    subject = f"{subject}: persistence"
    states = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
    failed = [name for name in states if info.get(name, "ok") != "ok"]
    if failed:
        found = f"a write to its disk failed ({', '.join(failed)})"
        return Check(subject, "bad", found, "free space on its disk, and read its log")
    return Check(subject, "ok", "its last writes to the disk succeeded")


def distance_checks(subject: str, redis: Redis, pings: int) -> Iterator[Check]:
    """Check the time of a command and the difference of the clocks. Raises RedisError."""
    yield _latency(subject, redis, pings)
    yield _clock(subject, redis)


def _latency(subject: str, redis: Redis, pings: int) -> Check:
    """The time of a command there and back. A small fork sends about ten."""
    subject, times = f"{subject}: latency", []
    for _ in range(pings):
        began = time.perf_counter()
        redis.ping()
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    found = f"{median * 1e3:.1f} ms (median of {pings})"
    if median > _SLOW_SECONDS:
        return Check(subject, "warn", found, "run Redis closer to the workers, or on a less busy host")
    return Check(subject, "ok", found)


def _clock(subject: str, redis: Redis) -> Check:
    """The difference of the clocks. Deadlines use that of Redis, leases those of the workers."""
    subject = f"{subject}: clock"
    before = time.time()
    seconds, microseconds = redis.time()
    difference = seconds + microseconds / 1e6 - (before + time.time()) / 2
    found = f"{abs(difference):.1f} s {'ahead of' if difference > 0 else 'behind'} this host's"
    if abs(difference) > _CLOCK_SECONDS:
        return Check(subject, "warn", found, "synchronize both hosts by NTP")
    return Check(subject, "ok", f"at most {_CLOCK_SECONDS:g} s from this host's")


def _append_only(subject: str, enabled: Any) -> Check:
    if not enabled:
        found = "no: accepted jobs are lost when Redis ends"
        fix = "set it in redis.conf, and now with: redis-cli CONFIG SET appendonly yes"
        return Check(f"{subject}: appendonly", "bad", found, fix)
    return Check(f"{subject}: appendonly", "ok", "yes")


def _eviction(subject: str, policy: str) -> Check:
    if policy != "noeviction":
        fix = "set it in redis.conf, and now with: redis-cli CONFIG SET maxmemory-policy noeviction"
        return Check(f"{subject}: maxmemory-policy", "bad", f"{policy}: Redis may delete accepted jobs", fix)
    return Check(f"{subject}: maxmemory-policy", "ok", policy)


def _memory(subject: str, used: int, most: int) -> Check:
    mib = f"{used / (1 << 20):.1f} MiB used"
    if not most:
        return Check(f"{subject}: memory", "ok", f"{mib}, no maxmemory")
    found = f"{mib} of {most / (1 << 20):.1f} MiB"
    if most - used < LOW_SHARE * most:
        return Check(f"{subject}: memory", "warn", found, "raise maxmemory, or lower FORKVM_RESULT_EXPIRES")
    return Check(f"{subject}: memory", "ok", found)


def _config(subject: str, redis: Redis) -> Check:
    """Check appendfsync, which only CONFIG shows. The user in SECURITY.md has no permission for it."""
    subject = f"{subject}: appendfsync"
    try:
        config = cast("dict[str, Any]", redis.config_get("appendfsync"))
    except ResponseError:
        fix = "ask its administrator: it should be everysec or always"
        return Check(subject, "warn", "unknown: CONFIG is not permitted", fix)
    value = next(iter(config.values()), "?")
    value = value.decode() if isinstance(value, bytes) else str(value)
    if value == "no":
        found = "no: a crash of its host loses jobs that the kernel had not written yet"
        return Check(
            subject, "warn", found, "set it in redis.conf, and now with: redis-cli CONFIG SET appendfsync everysec"
        )
    return Check(subject, "ok", value)
