"""Kernel releases that may have a known bug in the isolation of reflinks on XFS."""

from __future__ import annotations

import pytest

from worker.checks.copy_on_write import possible_faults

TANGO, REFLUX = "CVE-2026-80530", "CVE-2026-64600"


@pytest.mark.parametrize(
    ("release", "named"),
    [
        ("5.10.0-28-amd64", {REFLUX}),
        ("6.9.12", {REFLUX}),
        ("6.10.1", {TANGO, REFLUX}),
        ("6.12.95+deb13-amd64", {TANGO, REFLUX}),
        ("6.12.96", {TANGO}),
        ("6.12.104", {TANGO}),
        ("6.12.105", set()),
        ("6.17.13", {TANGO}),
        ("6.18.45-cloud", {TANGO}),
        ("6.18.46", set()),
        ("7.0.9", {TANGO}),
        ("7.1.9", {TANGO}),
        ("7.1.10", set()),
        ("7.2.0-rc6", {TANGO}),
        ("7.2.0-rc7", set()),
        ("7.2.0", set()),
        ("7.3", set()),
        ("unknown", set()),
    ],
)
def test_a_release_before_the_fix_of_its_series_may_have_the_bug(release: str, named: set[str]) -> None:
    assert {fault.cve for fault in possible_faults(release, has_exchange=True)} == named


def test_one_bug_needs_the_feature_exchange() -> None:
    assert possible_faults("6.12.100", has_exchange=False) == []
