"""The help of each command, as a terminal of 80 columns shows it."""

from __future__ import annotations

import shlex

import click
import pytest

from worker.cli import cli

COMMANDS = cli.list_commands(click.Context(cli))


def _help_of(name: str) -> str:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command.get_help(click.Context(command, info_name=f"forkvm {name}", terminal_width=80))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_and_the_exit_codes(name: str) -> None:
    _, example, exit_codes = _help_of(name).replace("Exit status:", "Example:").split("Example:")

    assert f"forkvm {name}" in example
    assert [line.split()[0] for line in exit_codes.splitlines() if line[2:3].isdigit()][-1] == "128+N"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_a_valid_call(name: str) -> None:
    example = _help_of(name).partition("Example:\n")[2].splitlines()[0]
    words = [word for word in shlex.split(example) if not word.startswith("FORKVM_")]

    context = cli.make_context("forkvm", words[1:], resilient_parsing=False)

    command = cli.get_command(context, name)
    assert command is not None
    command.make_context(name, words[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_into_80_columns(name: str) -> None:
    assert max(map(len, _help_of(name).splitlines())) <= 80


def test_no_summary_in_the_list_of_commands_is_cut() -> None:
    listed = cli.get_help(click.Context(cli, terminal_width=80))

    commands = listed.partition("Commands:\n")[2].partition("Exit status:")[0]

    assert [line.split()[0] for line in commands.splitlines() if line] == COMMANDS
    assert "..." not in commands
