"""The options that several commands share, and the requests, settings and connections that they make."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from tasks.copier.errors import Code, describe
from tasks.copier.io_priority import use_io_priority
from tasks.copier.options import DEFAULT_EXCLUDE, Cache, Durability, Preserve, Reflink, Snapshot, SourceOpen, Verify
from worker.commands.output import result_lines
from worker.cpus import available_cpus
from worker.exit_codes import BAD_CALL, FAILED
from worker.settings import BadSettings, Settings, read_settings
from worker.terminal.printing import print_json, print_line, print_message

if TYPE_CHECKING:
    from tasks.copier.fork_spec import ForkResult
    from worker.client import Client

#: More processes do not make a local fork faster: the filesystem's own locks are the limit.
_MOST_PROCESSES = 4

#: Some 30 years.
_LONGEST_SECONDS = 1e9

#: A path as an argument or option: shells complete it, and it need not exist.
PATH = click.Path(readable=False)


class _Id(click.ParamType[str]):
    """The id of a job, which Redis can hold."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The id. Raises BadParameter."""
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{text!r} is not UTF-8", param, ctx)
        if not text:
            self.fail("it is empty", param, ctx)
        return text


class Seconds(click.FloatRange):
    """A time that a command waits: not NaN, which is in no range, and not longer than a process can sleep."""

    def __init__(self, least: float, *, min_open: bool = False) -> None:
        super().__init__(least, _LONGEST_SECONDS, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Raises BadParameter."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail("it is not a number", param, ctx)
        return seconds


class _WordList(click.ParamType[list[str]]):
    """Words separated by commas, each one of `words`; converted to a list."""

    name = "list"

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The words of `value`. Raises BadParameter for another word."""
        if not isinstance(value, str):
            return value
        choice = click.Choice(self._words)
        return [choice.convert(word, param, ctx) for word in value.split(",") if word]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The words that the last one can become."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(before + comma + word) for word in self._words if word.startswith(last)]


#: The id of a job as an argument or option.
ID = _Id()
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
domain_option = click.option(
    "--domain", metavar="NAME", help="Domain whose workers run the job. Default: FORKVM_DOMAIN."
)


#: The fields of a ForkRequest as options.
_FORK_OPTIONS = (
    click.option(
        "--reflink",
        type=click.Choice(get_args(Reflink)),
        help="auto (default): copy a file that cannot be reflinked; always: fail instead; never: copy all.",
    ),
    click.option(
        "--snapshot",
        type=click.Choice(get_args(Snapshot)),
        help="auto (default): clone a btrfs subvolume by a snapshot if possible; never: clone its files.",
    ),
    click.option("--skip", multiple=True, metavar="PATH", help="Leave out this relative path. Repeatable."),
    click.option(
        "--exclude",
        multiple=True,
        metavar="PATTERN",
        help=f"Leave out entries that match. Repeatable. Default: {', '.join(DEFAULT_EXCLUDE)}.",
    ),
    click.option("--no-exclude", is_flag=True, help="Exclude nothing by pattern."),
    click.option(
        "--preserve",
        type=_WordList(get_args(Preserve)),
        metavar="LIST",
        help="Metadata to keep, separated by commas. Default: mode,ownership,timestamps,xattrs,hardlinks.",
    ),
    click.option(
        "--durability",
        type=click.Choice(get_args(Durability)),
        help="none (default); sync: write the fork to the disk before it is published.",
    ),
    click.option(
        "--verify",
        type=click.Choice(get_args(Verify)),
        help="none (default); content: compare every byte of the fork with the source.",
    ),
    click.option(
        "--max-copied-bytes",
        type=int,
        metavar="N",
        help="Fail instead of copying more than N bytes; 0: reflinks only. Default: no bound.",
    ),
    click.option(
        "--source-open",
        type=click.Choice(get_args(SourceOpen)),
        help="allow (default); refuse: fail if a file of the source is open for writing.",
    ),
    click.option(
        "--cache",
        type=click.Choice(get_args(Cache)),
        help="keep (default); drop: leave no copied data in the page cache.",
    ),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Copied to the result. Repeatable."),
)


def fork_options(command: Callable[..., None]) -> Callable[..., None]:
    """The fields of a ForkRequest as options of a command."""
    for option in reversed(_FORK_OPTIONS):
        command = option(command)
    return command


def request_of(paths: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The request made of `paths` (source and destinations) and the options that were given."""
    request = dict(paths)
    for name in ("reflink", "snapshot", "durability", "verify", "max_copied_bytes", "source_open", "cache"):
        if fields[name] is not None:
            request[name] = fields[name]
    if fields["skip"]:
        request["skip"] = list(fields["skip"])
    if fields["exclude"] or fields["no_exclude"]:
        request["exclude"] = list(fields["exclude"])
    if fields["preserve"] is not None:
        request["preserve"] = fields["preserve"]
    if fields["labels"]:
        request["labels"] = dict(label.partition("=")[::2] for label in fields["labels"])
    return request


def absolute(path: str) -> str:
    """`path` as an absolute path. Raises UsageError if the working directory was removed.

    `..` is resolved as the kernel does it, through symlinks, because a request must not contain it.
    """
    if path.startswith("/") or not path:
        return path
    try:
        whole = os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        raise click.UsageError("the working directory was removed; use absolute paths") from None
    if ".." not in path.split("/"):
        return whole
    parent, name = os.path.split(whole.rstrip("/"))
    return os.path.realpath(whole) if name in (".", "..") else os.path.join(os.path.realpath(parent), name)


def with_domain(settings: Settings, domain: str | None) -> Settings:
    """The settings with the domain of the option --domain, if it was given. Raises BadSettings."""
    if domain is None:
        return settings
    return read_settings(domain=domain)


def local_processes() -> int:
    """The number of processes of a local fork or campaign."""
    return min(_MOST_PROCESSES, available_cpus())


def prepare_io(settings: Settings) -> None:
    """Give this process the I/O priority of the settings. Raises BadSettings."""
    try:
        use_io_priority(settings.io_priority)
    except OSError as error:
        raise BadSettings(f"FORKVM_IO_PRIORITY: it cannot be set: {error.strerror}") from None


def connect(settings: Settings) -> Client:
    """A connection to the queue. Celery is imported here because that takes 0.3 s, which a local fork saves."""
    from worker.client import Client

    return Client(settings)


def print_result(result: ForkResult, as_json: bool) -> None:
    """Print the result of a fork, and end the command with exit code 1 or 2 if the fork failed."""
    error = result["error"]
    if as_json:
        print_json(result)
    elif error is None:
        for line in result_lines(result):
            print_line(line)
    if error is not None:
        print_message(describe(error))
        raise click.exceptions.Exit(BAD_CALL if error["code"] == Code.INVALID_REQUEST else FAILED)
