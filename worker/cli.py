"""The command line: `forkvm`. Exit codes: 0 done, 1 the fork failed, 2 a bad call, 3 no broker, 130 Ctrl-C."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Never

import click

from tasks.copier.errors import Code, ForkError, describe
from worker.commands.options import BAD_CALL, DONE, FAILED, INTERRUPTED, NO_BROKER
from worker.commands.output import say_usage
from worker.commands.signals import end_on_signals
from worker.commands.streams import close_streams, open_streams, use_utf8
from worker.commands.unexpected_errors import exit_code, unexpected
from worker.environment import remove_celery_variables
from worker.settings import BadSettings, NoBroker
from worker.terminal import say

#: Where each command is defined, under its own name.
_MODULES = {
    "fork": "worker.commands.fork",
    "submit": "worker.commands.queue",
    "campaign": "worker.commands.campaign",
    "status": "worker.commands.queue",
    "files": "worker.commands.queue",
    "forks": "worker.commands.campaign",
    "cancel": "worker.commands.queue",
    "worker": "worker.commands.worker",
    "doctor": "worker.commands.doctor",
    "verify": "worker.commands.fork",
    "gc": "worker.commands.gc",
    "demo": "worker.commands.worker",
}


def main() -> Never:
    """The entry point; turns what is known to go wrong into one line and an exit code."""
    use_utf8()
    open_streams()
    end_on_signals()
    remove_celery_variables()
    logging.getLogger("tasks").addHandler(logging.NullHandler())  # only a worker logs what it does
    try:
        code = _run()
    finally:
        close_streams()
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code."""
    try:
        # Without its standalone mode, click returns the code of an Exit instead of ending the process.
        return cli(standalone_mode=False) or DONE
    except click.ClickException as error:
        say_usage(error)
        return BAD_CALL
    except click.Abort:  # Ctrl-C
        return INTERRUPTED
    except BadSettings as error:
        say(str(error))
        return BAD_CALL
    except NoBroker as error:
        say(str(error))
        return NO_BROKER
    except ForkError as error:
        say(describe(error.record()))
        return BAD_CALL if error.code is Code.INVALID_REQUEST else FAILED
    except Exception as error:
        say(unexpected(error))
        return exit_code(error)


class _Commands(click.Group):
    """Finds each command in its module when it is called: most need modules that the others do without."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order of the help."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        module = _MODULES.get(cmd_name)
        return None if module is None else getattr(import_module(module), cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forkvm")
def cli() -> None:
    """Clone the directories of virtual machines: by reflink where the filesystem can, sparsely where it cannot."""


if __name__ == "__main__":
    main()
