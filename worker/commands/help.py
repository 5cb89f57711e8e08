"""The help of a command: after its options an example and its exit codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from worker.exit_codes import BAD_CALL, DONE, FAILED, MEANINGS, PROGRAM_FAULT

#: Codes of every command.
_COMMON = (DONE, BAD_CALL, PROGRAM_FAULT)
_BAD_CALL_OF_JOB = "Wrong arguments or settings, or an unknown id."
_SIGNAL = ("128+N", "Ended by signal N, for example 130 after Ctrl-C.")


class _Command(click.Command):
    """A click command whose help ends with an example and its exit codes."""

    def __init__(self, *args: Any, example: str, exit_codes: Mapping[int, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._example = example
        self._exit_codes = exit_codes

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the two sections."""
        with formatter.section("Example"):
            formatter.write(f"{'':{formatter.current_indent}}{self._example}\n")
        write_exit_codes(formatter, self._exit_codes)


def command(
    *, example: str, done: str = "", failed: str = "", codes: tuple[int, ...] = (), of_job: bool = False
) -> Callable[..., click.Command]:
    """A decorator like click.command.

    `example` is one call. `done` says when the command ends with exit code 0, `failed` when with 1; "" if it never
    does. `codes` are its exit codes other than 0, 1, 2, 70 and those of signals. `of_job`: it is about a job, and an
    unknown id is a bad call.
    """
    meanings = {code: MEANINGS[code] for code in (*_COMMON, *codes)}
    if of_job:
        meanings[BAD_CALL] = _BAD_CALL_OF_JOB
    meanings |= {code: meaning for code, meaning in ((DONE, done), (FAILED, failed)) if meaning}
    return click.command(cls=_Command, example=example, exit_codes=meanings)


def write_exit_codes(formatter: click.HelpFormatter, meanings: Mapping[int, str]) -> None:
    """Write the section that lists the exit codes with their meanings, and those of signals."""
    rows = [(str(code), meaning) for code, meaning in sorted(meanings.items())]
    with formatter.section("Exit status"):
        formatter.write_dl([*rows, _SIGNAL])
