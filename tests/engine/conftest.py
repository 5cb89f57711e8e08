"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.copier import progress
from tasks.copier.campaign import plan as campaign_plan
from tasks.copier.options import Limits
from tests.support.engine.forks import WAYS


@pytest.fixture(params=list(WAYS))
def limits(request: pytest.FixtureRequest) -> Limits:
    """A test with this fixture runs twice: with the fork in one task, and in chunks made by two children."""
    return WAYS[request.param]


@pytest.fixture
def every_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the poll callback after every entry and every piece of a file, so that a test can act at each.

    By default it is called four times a second.
    """
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.0)


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small campaign is one batch instead of eight."""
    monkeypatch.setattr(campaign_plan, "LEAST_BATCHES", 1)
    monkeypatch.setattr(campaign_plan, "BATCH_SECONDS", 10.0)


@pytest.fixture(scope="module")
def shared_tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One temporary directory for a whole module, for tests with many examples that share their fixtures."""
    return tmp_path_factory.mktemp("examples")
