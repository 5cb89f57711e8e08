"""Redis errors that are temporary and retried, and those that are not."""

from __future__ import annotations

from contextlib import suppress

import fakeredis
import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    ExecAbortError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
    TryAgainError,
    WatchError,
)

from tasks.delivery.outcome import outcome_of
from tasks.store.redis_errors import cause, is_passing, wait_out

TEMPORARY = [
    ConnectionError("Connection refused"),
    TimeoutError("Timeout reading from socket"),
    BusyLoadingError("Redis is loading the dataset in memory"),
    OperationalError("Connection refused"),
    ReadOnlyError("You can't write against a read only replica."),
    TryAgainError("Multiple keys request during rehashing of slot"),
    ClusterDownError("The cluster is down"),
    MasterDownError("Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
    ResponseError("NOREPLICAS Not enough good replicas to write."),
    ResponseError("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."),
    ResponseError("BUSY Redis is busy running a script."),
    ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)"),
    # a missing right, from a command, from kombu, and from a script of Redis 7.0 and of 7.2
    NoPermissionError("this user has no permissions to run the 'set' command"),
    NoPermissionError("No permissions to access a key"),
    OperationalError("this user has no permissions to run the 'lpush' command"),
    ResponseError(
        "The user executing the script can't run this command or subcommand script: ce86, on @user_script:3."
    ),
    ResponseError("ACL failure in script: User forkvm has no permissions to run the 'zadd' command"),
    # a command that its administrator has renamed, and one that a Redis without its scripts was sent
    ResponseError("unknown command 'EVALSHA', with args beginning with: 'a secret' "),
    NoScriptError("No matching script. Please use EVAL."),
    # from a script, before Redis 7 and since
    ResponseError("Error running script (call to f_0): @user_script:8: @user_script: 8: -READONLY You can't write"),
    ResponseError("MISCONF Redis is unable to persist to disk script: 0, on @user_script:1."),
    # from MULTI, as redis-py words it
    ReadOnlyError("Command # 1 (SET a b) of pipeline caused error: You can't write against a read only replica."),
    ExecAbortError("EXECABORT Transaction discarded because of previous errors: NOREPLICAS"),
]
PERMANENT = [
    OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
    WatchError("Watched variable changed."),
    OSError("no descriptors"),
    ValueError("READONLY"),
]


@pytest.mark.parametrize("error", TEMPORARY, ids=str)
def test_temporary_errors_are_retried(error: Exception) -> None:
    answers: list[Exception | str] = [error, "answer"]

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert is_passing(error)
    assert wait_out(call) == "answer"


@pytest.mark.parametrize("error", PERMANENT, ids=str)
def test_permanent_errors_are_raised(error: Exception) -> None:
    def call() -> None:
        raise error

    assert not is_passing(error)
    with pytest.raises(type(error)):
        wait_out(call)


def test_caller_may_retry_further_errors() -> None:
    answers = iter((OutOfMemoryError("full"), None))

    def call() -> bool:
        if (error := next(answers)) is not None:
            raise error
        return True

    assert wait_out(call, OutOfMemoryError)


def test_a_redis_error_is_shown_without_its_command_which_contains_data_of_a_guest() -> None:
    with fakeredis.FakeRedis() as redis:
        redis.set("a", "text")
        pipeline = redis.pipeline().rpush("a", b"a secret\0(name)")
        with pytest.raises(ResponseError) as refused:
            pipeline.execute()
    assert "a secret" in str(refused.value)  # so that the text comes from Redis, not from the program

    assert cause(refused.value) == "WRONGTYPE Operation against a key holding the wrong kind of value"
    assert cause(OSError(5, "Input/output error")) == "[Errno 5] Input/output error"


def test_a_missing_right_is_shown_with_what_to_do_and_without_arguments() -> None:
    shown = cause(ResponseError("unknown command 'EVALSHA', with args beginning with: 'a secret' "))

    assert shown.startswith("unknown command 'EVALSHA'; grant the rights that SECURITY.md lists: `forkvm doctor`")
    assert "a secret" not in shown


@pytest.mark.parametrize(("error", "is_failed"), [(PERMANENT[1], True), (PERMANENT[0], False), (TEMPORARY[4], False)])
def test_a_job_that_redis_refuses_for_good_fails_with_its_answer(error: Exception, is_failed: bool) -> None:
    def work() -> None:
        raise error

    failures: list[str] = []
    with suppress(ResponseError):
        outcome_of(work, lambda failure: failures.append(str(failure)))

    assert failures == ([f"io_error: Redis refused a command: {error}"] if is_failed else [])
