"""Suggestions for mistyped commands, shell completion, and JSON schemas."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from tasks.contract.schemas import NAMES, schema
from tests.fixtures.processes import forkvm_script
from worker.cli import cli


def _run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


@pytest.mark.parametrize(
    ("call", "suggestion"),
    [
        (["forkk", "a", "b"], "No such command 'forkk'. (Did you mean one of: 'fork', 'forks'?)"),
        (["fork", "--relfink", "never", "a", "b"], "No such option '--relfink'. Did you mean '--reflink'?"),
        (["fork", "--reflink", "alway", "a", "b"], "'alway' is not one of 'auto', 'always', 'never'."),
        (["fork", "--preserve", "mode,owner", "a", "b"], "'owner' is not one of 'mode', 'ownership', "),
        (["campaign", "a", "--on-error", "stop"], "'stop' is not one of 'continue', 'abort'."),
        (["top"], "stdout is not a terminal; use --json, or forkvm queues"),
        (["worker", "--loglevel", "verbose"], "'verbose' is not one of "),
        (["status", ""], "Invalid value for 'ID': it is empty"),
        (["submit", "a", "b", "--id", "\udcff"], "Invalid value for '--id': '\\udcff' is not UTF-8"),
        (["top", "--json", "--interval", "nan"], "Invalid value for '--interval': it is not a number"),
        (["submit", "a", "b", "--wait", "--timeout", "inf"], "Invalid value for '--timeout': inf is not in the range"),
        (["copy-rate", "9" * 30], "give none, or at least 65536 bytes per second"),
        (["schema", "fork"], "Invalid value for '[NAME]': 'fork' is not one of 'fork-request', "),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_mistyped_command_or_option_gets_a_suggestion(call: list[str], suggestion: str) -> None:
    done = _run(*call)

    assert done.exit_code == 2
    assert suggestion in done.stderr


@pytest.mark.parametrize(
    ("shell", "begins"), [("bash", "_forkvm_completion() {"), ("zsh", "#compdef forkvm"), ("fish", "function _forkvm")]
)
def test_completion_prints_the_script_of_a_shell(shell: str, begins: str) -> None:
    done = _run("completion", shell)

    assert done.exit_code == 0
    assert done.stdout.startswith(begins)


def test_completion_and_schema_take_json() -> None:
    assert json.loads(_run("completion", "fish", "--json").stdout)["script"] + "\n" == _run("completion", "fish").stdout
    assert _run("schema", "estimate", "--json").stdout == _run("schema", "estimate").stdout


def test_bash_completes_commands_options_and_values() -> None:
    script = """
        eval "$(forkvm completion bash)"
        complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _forkvm_completion forkvm
                           echo "${COMPREPLY[*]}"; }
        complete_words forkvm ca
        complete_words forkvm fork --refl
        complete_words forkvm fork --preserve mode,t
    """
    bash = shutil.which("bash")
    assert bash is not None

    done = subprocess.run(
        [bash, "-c", script],
        env={"PATH": f"{Path(forkvm_script()).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "campaign cancel",
        "--reflink",
        "mode,timestamps",
    ]


def test_the_help_names_each_schema() -> None:
    words = " ".join(_run("schema", "--help").stdout.replace("-\n  ", "-").split())

    assert [name for name in NAMES if name not in words] == []


def test_schema_prints_one_schema_or_all_by_their_names() -> None:
    one, everything = _run("schema", "file-result"), _run("schema")

    assert json.loads(one.stdout) == schema("file-result")
    assert json.loads(everything.stdout) == {name: schema(name) for name in NAMES}


def test_results_of_local_commands_match_their_schemas(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "disk").write_bytes(b"data")
    vm = str(tmp_path / "vm")

    fork = _run("fork", vm, f"{tmp_path}/fork", "--label", "a=b", "--json")
    failed = _run("fork", vm, f"{tmp_path}/fork", "--json")
    campaign = _run("campaign", vm, "--to", f"{tmp_path}/many-{{n}}", "--count", "2", "--local", "--json")
    partial = _run("campaign", vm, "--to", f"{tmp_path}/many-{{n}}", "--count", "3", "--local", "--json")

    for done, name in ((fork, "fork"), (failed, "fork"), (campaign, "campaign"), (partial, "campaign")):
        Draft202012Validator(schema(f"{name}-result")).validate(json.loads(done.stdout))
    assert json.loads(partial.stdout)["status"] == "partial"
