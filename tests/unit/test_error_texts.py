"""The page of all error texts is up to date."""

from __future__ import annotations

from tests.support.error_texts import ROOT, page


def test_the_page_of_error_texts_is_current() -> None:
    assert (ROOT / "docs/error-texts.md").read_text() == page(), (
        "regenerate it: python -m tests.support.error_texts > docs/error-texts.md"
    )
