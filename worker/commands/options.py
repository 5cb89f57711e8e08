"""What the commands take: options and the environment, made into requests, settings, connections and beats."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tasks.copier.errors import Code, describe
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import DEFAULT_EXCLUDE
from worker.commands.output import result_lines
from worker.cpus import available_cpus
from worker.settings import Settings, read_settings
from worker.terminal import answer, answer_json, say

if TYPE_CHECKING:
    from worker.client import Client

#: Exit codes.
DONE, FAILED, BAD_CALL, NO_BROKER = 0, 1, 2, 3
#: Nothing ended within the time that a command was to wait, as timeout(1) has it.
TIMED_OUT = 124
#: Ended by Ctrl-C, as a shell has it: 128 and the signal's number.
INTERRUPTED = 128 + signal.SIGINT
#: More processes than this gain nothing: the filesystem's own locks are the limit.
_MOST_PROCESSES = 4

as_json = click.option("--json", "as_json", is_flag=True, help="Answer with one JSON document.")


def fork_options(command: Callable[..., None]) -> Callable[..., None]:
    """The fields of a ForkRequest as options."""
    for option in reversed(
        (
            click.option("--reflink", help="auto (default), always or never."),
            click.option("--snapshot", help="auto (default) or never: a btrfs subvolume is cloned by a snapshot."),
            click.option("--skip", multiple=True, metavar="PATH", help="Relative path to leave out; may be repeated."),
            click.option(
                "--exclude",
                multiple=True,
                metavar="PATTERN",
                help=f"Pattern to leave out, in place of {', '.join(DEFAULT_EXCLUDE)}; may be repeated.",
            ),
            click.option("--no-exclude", is_flag=True, help="Leave nothing out by pattern."),
            click.option(
                "--preserve", metavar="LIST", help="mode,ownership,timestamps,xattrs,hardlinks (default all)."
            ),
            click.option("--durability", help="none (default) or sync: on the disk before it is called done."),
            click.option("--verify", help="none (default) or content: every byte is read back and compared."),
            click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Echoed back in the result."),
        )
    ):
        command = option(command)
    return command


def request_of(ends: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The request that `ends` (source and destinations) and the options stand for, without what was not given."""
    request = dict(ends)
    for name in ("reflink", "snapshot", "durability", "verify"):
        if fields[name] is not None:
            request[name] = fields[name]
    if fields["skip"]:
        request["skip"] = list(fields["skip"])
    if fields["exclude"] or fields["no_exclude"]:
        request["exclude"] = list(fields["exclude"])
    if fields["preserve"] is not None:
        request["preserve"] = [word for word in fields["preserve"].split(",") if word]
    if fields["labels"]:
        request["labels"] = dict(label.partition("=")[::2] for label in fields["labels"])
    return request


def absolute(path: str) -> str:
    """`path` as an absolute path: a relative one begins at the working directory. Raises UsageError.

    `..` is resolved as the kernel does it, through symlinks: a request may not hold any.
    """
    if path.startswith("/") or not path:
        return path
    try:
        whole = os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        raise click.UsageError("the working directory was removed; give absolute paths") from None
    if ".." not in path.split("/"):
        return whole
    parent, name = os.path.split(whole.rstrip("/"))
    return os.path.realpath(whole) if name in (".", "..") else os.path.join(os.path.realpath(parent), name)


def with_domain(settings: Settings, domain: str | None) -> Settings:
    """The settings, with the domain that an option named instead of the environment's. Raises BadSettings."""
    if domain is None:
        return settings
    return read_settings(domain=domain)


def local_processes() -> int:
    """How many processes work on what is done without a broker."""
    return min(_MOST_PROCESSES, available_cpus())


def connect(settings: Settings) -> Client:
    """A connection to the queue. Celery is imported for who needs it: it would cost a local fork 0.3 s."""
    from worker.client import Client

    return Client(settings)


def answer_result(result: ForkResult, as_json: bool) -> None:
    """Print the result of a fork, and end the command as the fork ended."""
    error = result["error"]
    if as_json:
        answer_json(result)
    elif error is None:
        for line in result_lines(result):
            answer(line)
    if error is not None:
        say(describe(error))
        raise click.exceptions.Exit(BAD_CALL if error["code"] == Code.INVALID_REQUEST else FAILED)
