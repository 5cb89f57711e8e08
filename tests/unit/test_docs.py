"""The documents: links are valid, the README stays short, the names in them exist, and the language is plain."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tasks.copier.errors import Code
from tasks.names import ABANDON_TASK

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: Entry points and packages that a document may name; `CHANGELOG.md` may also name removed ones.
HISTORY = ROOT / "CHANGELOG.md"

MOST_LINES_OF_README = 150

#: The modules, whose comments, docstrings and messages are read like documents; but not this one.
MODULES = sorted(
    {path for folder in ("benchmarks", "tasks", "tests", "worker") for path in (ROOT / folder).rglob("*.py")}
    - {Path(__file__)}
)

#: Words of a dialect that earlier documents were written in. The field has plain terms for each.
BANNED = (
    *("whoever", "stands", "standing", "mend", "mends", "mended", "bury", "buried", "anew", "for ever", "of which"),
    *("vanguard", "crew", "pulse", "unbegun", "but for", "struck", "the books", "goes on with", "there is nobody"),
)

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
#: `tasks.store.results` or `worker.runtime.bootsteps.Lease`.
_MODULE = re.compile(r"(?:tasks|worker|benchmarks)(?:\.\w+)+")
_PATH = re.compile(r"(?<![\w/.-])(?:tasks|worker|tests|benchmarks|deploy|scripts)/[\w./@-]+")


def _name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@cache
def _prose(document: Path) -> str:
    return _FENCE.sub("", document.read_text())


def _anchors(document: Path) -> set[str]:
    """The anchors that GitHub creates for the headings."""
    headings = re.findall(r"^#+ (.+)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _is_in_source(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        for module in (path.with_suffix(".py"), path / "__init__.py"):
            if module.is_file():
                text = module.read_text()
                return all(re.search(rf"\b{part}\b", text) for part in parts[length:])
    return False


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES_OF_README


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_in_a_document_are_valid(document: Path) -> None:
    broken = []
    for link in _LINK.findall(_prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - {HISTORY}), ids=_name)
def test_names_in_a_document_exist_in_the_source(document: Path) -> None:
    text = _prose(document)
    codes = [code.strip() for code in _CODE.findall(text)]
    modules = [code for code in codes if _MODULE.fullmatch(code)]
    paths = [path.rstrip(".") for path in _PATH.findall(text)]

    assert [name for name in modules if not _is_in_source(name)] == []
    assert [path for path in paths if not any((ROOT / f"{path}{end}").exists() for end in ("", ".py"))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_a_document_is_written_in_plain_english(document: Path) -> None:
    assert _banned_words(_CODE.sub("", _prose(document))) == []


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_a_module_is_written_in_plain_english(module: Path) -> None:
    assert _banned_words(module.read_text().replace(ABANDON_TASK, "")) == []


def _banned_words(text: str) -> list[str]:
    return re.findall(rf"\b(?:{'|'.join(BANNED)})\b", re.sub(r"\s+", " ", text), re.IGNORECASE)


def test_the_runbook_has_each_error_code_and_each_alert() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text())

    assert [code.value for code in Code if f"`{code.value}`" not in runbook] == []
    assert alerts
    assert [alert for alert in alerts if f"\n## {alert}\n" not in runbook] == []
