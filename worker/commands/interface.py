"""The commands that describe forkvm to other programs: `forkvm completion` to shells, `forkvm schema` to schedulers."""

from __future__ import annotations

import json
from typing import cast

import click
from click.shell_completion import get_completion_class

from tasks.contract.schemas import NAMES
from tasks.contract.schemas import schema as schema_of
from worker.commands.help import command

#: The program, and the variable by which click's scripts ask it for completions.
_PROGRAM = "forkvm"
_VARIABLE = "_FORKVM_COMPLETE"


@command(example="forkvm completion bash", done="The script was printed.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script by which a shell completes forkvm.

    bash: save it in a file that bash-completion loads, or put `eval "$(forkvm completion bash)"` into ~/.bashrc. zsh:
    the same with ~/.zshrc, after compinit. fish: save it as ~/.config/fish/completions/forkvm.fish.
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    group = cast(click.Group, click.get_current_context().find_root().command)
    print(shell_class(group, {}, _PROGRAM, _VARIABLE).source())


@command(example="forkvm schema fork-request", done="The schema was printed.")
@click.argument("name", required=False, type=click.Choice(NAMES), metavar="[NAME]")
def schema(name: str | None) -> None:
    """Print the JSON Schema of a request or result.

    NAME is fork-request, fork-result, fork-progress, estimate, file-result, campaign-request, campaign-result or
    campaign-progress. Without it, all schemas are printed as one JSON object, by their names.
    """
    found = {one: schema_of(one) for one in NAMES} if name is None else schema_of(name)
    print(json.dumps(found, indent=2))
