"""The page of `forkvm report`: its content, and that it escapes names in a guest."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from tasks.contract.remedies import REMEDIES, remedy_text
from tasks.copier.campaign.spec import CampaignSpec, campaign_result
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed, succeeded
from tasks.copier.report import FileResult, Totals
from worker.commands.report.contents import contents_of_campaign, contents_of_fork
from worker.commands.report.durations import Durations, span
from worker.commands.report.page import page

HOSTILE = """</code><script>alert(1)</script><img src=x onerror='alert(2)'>"&amp;\x1b[2J\udcff\n<b>"""
#: The only elements of a page.
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "strong", "code", "wbr", "div"),
    *("dl", "dt", "dd", "table", "tr", "th", "td", "span", "svg", "g", "rect", "text"),
}


class _Page(HTMLParser):
    """What a browser sees: elements, attributes, the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _file(path: str, seconds: float = 0.001, error: ForkError | None = None) -> FileResult:
    return {
        "path": path,
        "type": "file",
        "method": "copy",
        "bytes": 1 << 20,
        "copied_bytes": 1 << 20,
        "seconds": seconds,
        "reason": None,
        "error": None if error is None else error.record(),
    }


def _spec(name: str, labels: dict[str, str] | None = None) -> ForkSpec:
    return ForkSpec(fork_id=name, source=f"/guests/{name}", destination=f"/forks/{name}", labels=labels or {})


def _failed_fork(name: str) -> ForkResult:
    totals = Totals(fallback={"reason": name, "errno": 18, "path": name}, metadata_lost_total=1)
    totals.metadata_lost.append({"path": name, "what": f"xattr {name}"})
    spec = _spec(name, {name: name})
    return failed(spec, ForkError(Code.IO_ERROR, name, name, 5), totals, 1, Clock(spec.started))


def _page_of_fork(name: str) -> _Page:
    files = [_file(name, 0.5), _file(name, error=ForkError(Code.NO_SPACE, name, name, 28))]
    return _Page(page(contents_of_fork(_failed_fork(name), files)))


def _page_of_campaign(name: str) -> _Page:
    fork = _failed_fork(name)
    spec = CampaignSpec(campaign_id=name, source=name)
    error = ForkError(Code.CANCELLED, name, name)
    return _Page(page(contents_of_campaign(campaign_result(spec, {}, [], error=error), [fork])))


@pytest.mark.parametrize("make", [_page_of_fork, _page_of_campaign])
def test_a_hostile_name_is_only_text(make: Any) -> None:
    hostile, plain = make(HOSTILE), make("name")

    assert hostile.open == []
    assert hostile.elements == plain.elements
    assert hostile.attributes == plain.attributes
    assert hostile.elements - ELEMENTS == set()
    assert "<script>alert(1)</script>" in hostile.text
    assert "\x1b" not in hostile.text
    assert "\\x1b[2J\\udcff\\n" in hostile.text


@pytest.mark.parametrize("make", [_page_of_fork, _page_of_campaign])
def test_a_page_loads_no_resource_and_runs_no_script(make: Any) -> None:
    found = make("name")

    assert found.attributes & {"src", "href", "srcset", "action", "onerror", "onload"} == set()
    assert "url(" not in found.text
    assert "@import" not in found.text


def test_the_page_of_a_fork_shows_the_error_and_its_remedy() -> None:
    totals = Totals(total=1000, copied=1000)
    files = [_file(f"disk-{n}", n / 1000) for n in range(1, 1000)]
    spec = _spec("fork-1")
    good = _Page(page(contents_of_fork(succeeded(spec, totals, 3, Clock(spec.started)), files)))
    bad = _page_of_fork("fork-2")

    assert "succeeded" in good.text
    assert "disk-999" in good.text
    assert "disk-979" not in good.text  # the 20 slowest are listed
    assert "999 entries; each bar" in good.text
    assert "Failures: 0" in good.text
    assert remedy_text("io_error") in bad.text
    assert remedy_text("no_space") in bad.text
    assert "Failures: 2" in bad.text


def test_names_in_a_remedy_are_elements_and_not_backticks() -> None:
    spec = _spec("fork-1")
    error = ForkError(Code.COPY_BUDGET_EXCEEDED, "too much", "disk")

    text = page(contents_of_fork(failed(spec, error, Totals(), 0, Clock(spec.started)), []))

    assert "raise <code>max_copied_bytes</code>." in text


def test_a_failed_fork_has_a_failure_also_if_no_file_failed_and_one_for_the_file_that_failed_it() -> None:
    fork = _failed_fork("fork-1")
    error = ForkError(Code.IO_ERROR, "fork-1", "fork-1", 5)

    alone = _Page(page(contents_of_fork(fork, [])))
    with_file = _Page(page(contents_of_fork(fork, [_file("disk", error=error)])))

    for found in (alone, with_file):
        assert "Failures: 1" in found.text
        assert found.text.count(remedy_text("io_error")) == 1


def test_the_page_of_a_campaign_lists_its_forks() -> None:
    forks = [_failed_fork("many.1")]
    for n in (2, 3):
        spec = _spec(f"many.{n}")
        forks.append(succeeded(spec, Totals(), 1, Clock(spec.started - n)))
    result = campaign_result(CampaignSpec(campaign_id="many", source="/a"), {"forks.succeeded": 2}, [])

    found = _Page(page(contents_of_campaign(result, forks)))

    assert found.text.index("many.3: /forks/many.3") < found.text.index("many.2: /forks/many.2")
    assert "Failures: 1" in found.text
    assert "2 forks; each bar" in found.text


def test_durations_are_counted_in_their_bins() -> None:
    durations = Durations()
    for seconds in (0.0, 1e-6, 0.0015, 0.0019, 0.002, 1e9):
        durations.add(seconds)

    bins = durations.bins()

    assert [one for one in bins if one.items] == [(1e-5, 2e-5, 2), (1e-3, 2e-3, 2), (2e-3, 5e-3, 1), (5e3, 1e4, 1)]
    assert all(one.high == other.low for one, other in pairwise(bins))
    assert Durations().bins() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 µs"), (2e-5, "20 µs"), (0.0015, "1.5 ms"), (12.0, "12 s"), (150.0, "2.5 min"), (7200.0, "120 min")],
)
def test_a_duration_has_a_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_each_error_code_has_a_remedy() -> None:
    assert list(REMEDIES) == list(Code)
    assert remedy_text("of_a_later_version") == ""
