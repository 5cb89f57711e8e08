"""The table of docs/error-texts.md: every error text in the source, read from its syntax tree.

`python -m tests.support.error_texts > docs/error-texts.md` writes the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

#: Exceptions, and functions that create one: the code of their error, and the index of the argument with the text.
#: Without a code, the first argument is the code.
_MAKERS: dict[str, tuple[str | None, int]] = {
    "ForkError": (None, 1),
    "Malformed": ("io_error", 0),
    "NotOurs": ("io_error", 1),
    "from_oserror": ("by errno", 1),
    "from_errno": ("by errno", 1),
    "from_source": ("source_changed, by errno", 1),
    "Refused": ("invalid_request", 0),
    "BadSignature": ("invalid_request", 0),
    "Undecodable": ("invalid_request", 0),
    "LocksNotShared": ("exit code 1", 0),
    "UsageError": ("exit code 2", 0),
    "BadSettings": ("exit code 2", 0),
    "NoBroker": ("exit code 3", 0),
}
#: Modules whose ValueErrors are texts too: pydantic forwards those of the contract, and settings those of the others.
_VALUE_ERRORS = {
    "tasks/contract": "invalid_request",
    "worker/settings.py": "exit code 2",
    "worker/redis_url.py": "exit code 2",
}

_HEAD = """\
# Error texts

Every error text in `tasks/` and `worker/`, so that they can be read together. A text says what happened, where, and
what to do. The path of the error is a field of its own and comes before the text in logs and messages. Not on this
page: the findings of `forkvm doctor`, which a worker repeats when it starts, and texts of the kernel, of Redis and of
pydantic.

- `exit code N`: the text of a command or worker that ends with this code. That of a setting follows its name.
- `{…}` is a value that is filled in.
- `by errno`: the code is `no_space` for ENOSPC and EDQUOT, `permission_denied` for EACCES and EPERM, otherwise
  `io_error`. The kernel's description of the errno follows the text.
- `source_changed, by errno`: `source_changed` if the entry was removed or replaced, otherwise by errno.
- Texts of a check of what is read back from staging (`Malformed`) follow `the staging directory is damaged:`. Texts of
  an entry that is not the worker's own (`NotOurs`) follow `not usable as staging:`.

This page is generated. After a change of an error text, regenerate it, or `tests/unit/test_error_texts.py` fails:

    python -m tests.support.error_texts > docs/error-texts.md

| code | text | module |
|---|---|---|
"""


class ErrorText(NamedTuple):
    """One error text of the source, with placeholders for values."""

    code: str
    text: str
    module: str


def page() -> str:
    """The content of docs/error-texts.md."""
    texts = sorted({text for folder in ("tasks", "worker") for text in _texts_in(ROOT / folder)})
    rows = (f"| {text.code} | {_escaped(text.text)} | `{text.module}` |\n" for text in texts)
    return _HEAD + "".join(rows)


def _texts_in(folder: Path) -> Iterator[ErrorText]:
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        makers = dict(_MAKERS)
        for start, code in _VALUE_ERRORS.items():
            if name.startswith(start):
                makers["ValueError"] = (code, 0)
        yield from _texts_of(ast.parse(path.read_text()), name, makers)


def _texts_of(tree: ast.Module, module: str, makers: dict[str, tuple[str | None, int]]) -> Iterator[ErrorText]:
    """The texts of one module.

    A function that uses its own parameter in a text yields one text for each of its callers.
    """
    constants = _constants(tree)
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        parameters = [one.arg for one in function.args.args]
        for call in _calls(function):
            maker = makers.get(_called(call))
            if maker is None or len(call.args) <= maker[1] or function.name in makers:
                continue
            code = maker[0] or _code(call.args[0])
            for value in _values(function, call, call.args[maker[1]]):
                text = _template(value, constants)
                callers = _callers(tree, function, _last_parameter(value, parameters), parameters)
                for argument in callers:
                    inner = _template(argument, constants)
                    yield from _shown(code, f"{text[: text.rindex('{')]}{inner}", module)
                if not callers:
                    yield from _shown(code, text, module)


def _shown(code: str, text: str, module: str) -> Iterator[ErrorText]:
    """The text, unless it is entirely that of another error."""
    if re.sub(r"{[^{}]*}", "", text).strip(": "):
        yield ErrorText(code, text, module)


def _callers(
    tree: ast.Module, function: ast.FunctionDef, parameter: str | None, parameters: list[str]
) -> list[ast.expr]:
    """The arguments that calls in the module pass as `parameter` of `function`."""
    if parameter is None:
        return []
    index = parameters.index(parameter)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call.args[index] for call in calls if _called(call) == function.name and len(call.args) > index]


def _calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    """The calls in a function, without those in nested functions."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Call):
            yield node
        if not isinstance(node, ast.FunctionDef):
            pending += ast.iter_child_nodes(node)


def _values(function: ast.FunctionDef, call: ast.Call, text: ast.expr) -> list[ast.expr]:
    """The expressions that `text` can be: for a local name, its earlier assignments, in each branch of an if."""
    if not isinstance(text, ast.Name):
        return [text]
    before = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and node.lineno < call.lineno
        and any(isinstance(target, ast.Name) and target.id == text.id for target in node.targets)
    ]
    if not before:
        return [text]
    last = max(before, key=lambda node: node.lineno)
    for branches in ast.walk(function):
        if isinstance(branches, ast.If) and (branches.end_lineno or 0) < call.lineno and last in ast.walk(branches):
            return [node.value for node in before if node in ast.walk(branches)]
    return [last.value]


def _constants(tree: ast.Module) -> dict[str, str]:
    """The named texts and numbers of the module."""
    return {
        target.id: str(node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _last_parameter(value: ast.expr, parameters: list[str]) -> str | None:
    """The parameter that is the text, or its last part."""
    last = value.values[-1] if isinstance(value, ast.JoinedStr) and value.values else value
    last = last.value if isinstance(last, ast.FormattedValue) else last
    return last.id if isinstance(last, ast.Name) and last.id in parameters else None


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _code(argument: ast.expr) -> str:
    return argument.attr.lower() if isinstance(argument, ast.Attribute) and argument.attr.isupper() else "varies"


def _template(value: ast.expr, constants: dict[str, str]) -> str:
    """The text of an expression, with its variable parts in braces."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(_template(part, constants) for part in value.values)
    if isinstance(value, ast.BinOp):
        return _template(value.left, constants) + _template(value.right, constants)
    if isinstance(value, ast.IfExp):
        return f"{_template(value.body, constants)} / {_template(value.orelse, constants)}"
    inner = value.value if isinstance(value, ast.FormattedValue) else value
    if isinstance(inner, ast.Name) and inner.id in constants:
        return constants[inner.id]
    if isinstance(inner, ast.Call) and _called(inner) == "format" and isinstance(inner.func, ast.Attribute):
        return _template(inner.func.value, constants)
    return f"{{{ast.unparse(inner)}}}"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_])", r"\\\1", text.replace("\n", " "))


if __name__ == "__main__":
    print(page(), end="")
