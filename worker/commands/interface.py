"""The commands that describe forkvm to other programs: `forkvm completion` to shells, `forkvm schema` to schedulers."""

from __future__ import annotations

import json
from typing import cast

import click
from click.shell_completion import get_completion_class

from tasks.contract.schemas import NAMES
from tasks.contract.schemas import schema as schema_of
from worker.commands.help import command
from worker.commands.options import as_json
from worker.terminal.printing import print_json

#: The program, and the variable by which click's scripts ask it for completions.
_PROGRAM = "forkvm"
_VARIABLE = "_FORKVM_COMPLETE"


@command(example="forkvm completion bash", done="The script was printed.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@as_json
def completion(shell: str, as_json: bool) -> None:
    """Print the script by which a shell completes forkvm.

    bash: save it in a file that bash-completion loads, or put `eval "$(forkvm completion bash)"` into ~/.bashrc. zsh:
    the same with ~/.zshrc, after compinit. fish: save it as ~/.config/fish/completions/forkvm.fish.
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    group = cast(click.Group, click.get_current_context().find_root().command)
    script = shell_class(group, {}, _PROGRAM, _VARIABLE).source()
    print_json({"shell": shell, "script": script}) if as_json else print(script)


@command(example="forkvm schema fork-request", done="The schema was printed.")
@click.argument("name", required=False, type=click.Choice(NAMES), metavar="[NAME]")
@click.option("--json", is_flag=True, expose_value=False, help="As without it: a schema is JSON.")
def schema(name: str | None) -> None:
    """Print the JSON Schema of a request or result.

    NAME is fork-request, fork-result, fork-progress, estimate, file-result, campaign-request, campaign-result or
    campaign-progress. Without it, all schemas are printed as one JSON object, by their names.
    """
    found = {one: schema_of(one) for one in NAMES} if name is None else schema_of(name)
    print(json.dumps(found, indent=2))
