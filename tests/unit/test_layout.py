"""The layout of the source: the allowed imports between packages, and the maximum size of files, functions and folders.

The layers are drawn in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ("tasks", "worker")
SOURCES = (*PROGRAM, "tests", "benchmarks")

MOST_LINES_OF_FILE = 400
MOST_LINES_OF_TEST_FILE = 500
MOST_LINES_OF_FUNCTION = 60
MOST_MODULES = 14

#: From the bottom up. A module imports from its own layer and from those below it only.
LAYERS = (
    (
        "tasks.copier.counted",
        "tasks.copier.errors",
        "tasks.copier.validation",
        "tasks.copier.options",
        "tasks.copier.copy_rate",
        "tasks.copier.progress",
    ),
    ("tasks.copier.kernel",),
    ("tasks.copier.source",),
    (
        "tasks.copier.roots",
        "tasks.copier.endpoints",
        "tasks.copier.metadata_losses",
        "tasks.copier.report",
        "tasks.copier.fork_spec",
        "tasks.copier.child_processes",
        "tasks.copier.io_priority",
    ),
    ("tasks.copier.clone",),
    ("tasks.copier.staging",),
    ("tasks.copier.space",),
    ("tasks.copier.fork",),
    ("tasks.copier.campaign", "tasks.copier.estimate"),
    ("tasks.names", "tasks.events", "tasks.fork_summary", "tasks.contract"),
    ("tasks.store",),
    ("tasks.fork_ledger",),
    ("tasks.complete_forks",),
    ("tasks.context", "tasks.delivery"),
    ("tasks.cleanup", "tasks.sweep"),
    ("tasks.fork",),
    ("tasks.campaign",),
    (
        "worker.exit_codes",
        "worker.terminal",
        "worker.own_packages",
        "worker.environment",
        "worker.redis_url",
        "worker.secret_files",
        "worker.tls",
        "worker.cpus",
        "worker.started_processes",
        "worker.settings",
    ),
    ("worker.observability",),
    ("worker.runtime",),
    ("worker.overview",),
    ("worker.client",),
    ("worker.checks",),
    ("worker.app",),
    ("worker.commands",),
    ("worker.cli",),
)
#: Packages whose `__init__` is in no layer and may import anything: Python imports it before the modules in it.
TOPS = ("tasks", "tasks.copier", "worker")


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def _modules() -> dict[str, ast.Module]:
    return {_name(path): ast.parse(path.read_text()) for path in _files(*PROGRAM)}


def _imports(module: str) -> set[str]:
    """The modules of the program that `module` imports anywhere, lazy imports included."""
    modules, found = _modules(), set()
    for node in ast.walk(modules[module]):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in modules and name != module}


def _layer(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if any(module == part or module.startswith(f"{part}.") for part in layer):
            return number
    raise AssertionError(f"{module} is in no layer")


@pytest.mark.parametrize("module", sorted(set(_modules()) - set(TOPS)))
def test_a_module_imports_only_from_its_layer_and_below(module: str) -> None:
    above = {name for name in _imports(module) - set(TOPS) if _layer(name) > _layer(module)}

    assert not above


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: _imports(module) for module in _modules()}
    while leaves := {module for module, imported in graph.items() if not imported}:
        graph = {module: imported - leaves for module, imported in graph.items() if module not in leaves}

    assert not graph


def test_the_kernel_layer_imports_nothing_else_of_the_program() -> None:
    kernel = [module for module in _modules() if module.startswith("tasks.copier.kernel")]
    imported = {name for module in kernel for name in _imports(module) if not name.startswith("tasks.copier.kernel")}

    assert imported == set()


def test_a_package_has_a_docstring() -> None:
    packages = [_name(path) for path in _files(*PROGRAM) if path.name == "__init__.py"]

    assert [package for package in packages if not ast.get_docstring(_modules()[package])] == []


def test_the_docstring_of_a_package_names_each_of_its_modules() -> None:
    packages = [path for path in _files(*PROGRAM) if path.name == "__init__.py"]
    unnamed = {
        f"{_name(package)}.{module}"
        for package in packages
        for module in _modules_in(package.parent)
        if not re.search(rf"\b{module}\b", ast.get_docstring(_modules()[_name(package)]) or "")
    }

    assert unnamed == set()


def _modules_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"} | {
        one.parent.name for one in folder.glob("*/__init__.py")
    }


def test_no_folder_has_too_many_modules() -> None:
    folders = {path.parent for path in _files(*PROGRAM, "benchmarks")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}

    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in _files(*SOURCES)}
    most = {path: MOST_LINES_OF_TEST_FILE if "tests" in path.parts else MOST_LINES_OF_FILE for path in lengths}

    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > most[path]} == {}


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def test_no_function_is_too_long() -> None:
    long = {
        f"{_name(path)}.{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in _files(*SOURCES)
        for function in _functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MOST_LINES_OF_FUNCTION
    }

    assert long == {}


def _patched_names(tree: ast.Module) -> Iterator[str]:
    """What `setattr`, `patch.object` and others replace: their second argument, or the end of a dotted first one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "object", "patch"):
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from (text.rpartition(".")[2] for text in texts)


def test_no_test_replaces_a_private_name() -> None:
    private = {
        f"{_name(path)}: {name}"
        for path in _files("tests")
        for name in _patched_names(ast.parse(path.read_text()))
        if name.startswith("_")
    }

    assert private == set()
