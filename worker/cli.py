"""The command `forkvm`: a group that finds each command in its module."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Never

import click

from worker.commands.errors import run
from worker.commands.help import write_exit_codes
from worker.environment import remove_celery_variables
from worker.exit_codes import FAILED, MEANINGS
from worker.terminal.signals import exit_on_signals
from worker.terminal.streams import close_streams, open_streams, use_utf8

#: The module of each command, which defines it under its own name; in the order of the help.
_MODULES = {
    "fork": "worker.commands.fork",
    "estimate": "worker.commands.fork",
    "submit": "worker.commands.queue",
    "campaign": "worker.commands.campaign",
    "status": "worker.commands.queue",
    "files": "worker.commands.queue",
    "forks": "worker.commands.campaign",
    "cancel": "worker.commands.queue",
    "report": "worker.commands.report.command",
    "queues": "worker.commands.watch.queues",
    "top": "worker.commands.watch.queues",
    "worker": "worker.commands.worker",
    "doctor": "worker.commands.doctor",
    "verify": "worker.commands.fork",
    "copy-rate": "worker.commands.worker",
    "gc": "worker.commands.gc",
    "demo": "worker.commands.worker",
    "completion": "worker.commands.interface",
    "schema": "worker.commands.interface",
}


def main() -> Never:
    """The entry point of the program: runs the command and ends the process with its exit code."""
    use_utf8()
    open_streams()
    exit_on_signals()
    remove_celery_variables()
    logging.getLogger("tasks").addHandler(logging.NullHandler())  # log lines are for workers only
    try:
        # Without its standalone mode, click returns the code of an Exit instead of ending the process.
        code = run(lambda: cli(standalone_mode=False))
    finally:
        close_streams()
    sys.exit(code)


class _Commands(click.Group):
    """Imports a command's module when the command is called: most need modules that the others do not."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order of the help."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        module = _MODULES.get(cmd_name)
        return None if module is None else getattr(import_module(module), cmd_name.replace("-", "_"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` begin with. Raises NoSuchCommand, which suggests a similar name."""
        if args[0] not in _MODULES and not args[0].startswith("-"):
            raise click.NoSuchCommand(args[0], possibilities=_MODULES, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes of all commands."""
        failed = "The work failed or was cancelled. Each command's help has the details."
        write_exit_codes(formatter, MEANINGS | {FAILED: failed})


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forkvm")
def cli() -> None:
    """Clone directories of virtual machines.

    Files are reflinked where the filesystem supports it, and copied without their holes elsewhere.
    """


if __name__ == "__main__":
    main()
