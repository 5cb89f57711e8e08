"""The metrics: their names, labels and format, and that docs/operations.md lists them."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Event
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from worker.observability.consumer import Consumer
from worker.observability.gauges import Gauges, RedisValues, RootReader, RootValues
from worker.observability.health import Health
from worker.observability.metrics import Metrics
from worker.observability.readings import Reading

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

REDIS = RedisValues("7.0.15", {"forkvm": 3}, {"forkvm": 1})
ROOT = RootValues(is_writable=True, free_bytes=1 << 40, free_inodes=None, stagings=2)


class _Read(Reading[Any]):
    """A value that was read."""

    def __init__(self, value: object) -> None:
        super().__init__("a value", lambda: value)
        self._value = value

    def value(self) -> Any:
        return self._value


def _page(redis: object = REDIS, root: object = ROOT) -> str:
    metrics = Metrics()
    for report in (
        ["forks", "f", "", False, [["succeeded", "", 1]], {"copy": 2}, {"copy": 3}, {"total": 0.5}],
        ["fallback", 18, "xfs", "ext4", 1],
        ["takeover"],
        ["redelivery", "process_lost"],
    ):
        metrics.count(report)
    metrics.registry.register(Gauges(Consumer(), _Read(redis), {"/guests": _Read(root)}))
    return prometheus_client.generate_latest(metrics.registry).decode()


def test_the_page_has_the_metrics_that_the_documentation_lists_with_these_labels() -> None:
    rows = re.findall(r"^\| (`forkvm_\w+`.*?) \| (.*?) \|", OPERATIONS.read_text(), re.MULTILINE)
    documented = {
        name: set(re.findall(r"`(\w+)`", labels)) for names, labels in rows for name in re.findall(r"`(\w+)`", names)
    }

    families = [f for f in text_string_to_metric_families(_page()) if f.name.startswith("forkvm_")]

    shown = {
        f.name + ("_total" if f.type == "counter" else ""): {
            label for sample in f.samples for label in sample.labels if label != "le"
        }
        for f in families
    }
    assert shown | {"forkvm_root_free_inodes": {"root"}} == documented


def test_the_page_follows_the_rules_of_promtool() -> None:
    """Each metric has a help text and a type; counters end with _total, and nothing else does; units are base units."""
    for family in text_string_to_metric_families(_page()):
        assert family.documentation.endswith("."), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
        assert not re.search(r"_(count|sum|bucket|info_total|ms|kib|minutes)$", family.name), family.name


def test_values_that_could_not_be_read_are_omitted() -> None:
    page = _page(redis=None, root=None)

    assert "forkvm_queue_messages{" not in page
    assert "forkvm_root_free_bytes{" not in page
    assert "forkvm_children 0.0" in page


def test_inodes_without_a_limit_are_omitted() -> None:
    assert "forkvm_root_free_inodes{" not in _page()


def test_a_reading_that_hangs_does_not_block_the_others() -> None:
    asked, never = Event(), Event()

    def hang() -> RootValues:
        asked.set()
        never.wait(60)
        return ROOT

    hanging = Reading("a root", hang, OSError)
    hanging.start()
    assert asked.wait(30)
    gauges = Gauges(Consumer(), _Read(REDIS), {"/dead": hanging, "/guests": _Read(ROOT)})

    samples = [sample for family in gauges.collect() for sample in family.samples]

    assert [s.labels["root"] for s in samples if s.name == "forkvm_root_free_bytes"] == ["/guests"]
    assert Health(Consumer(is_connected=True), _Read(REDIS), {"/dead": hanging}).why_not_ready() == [
        "root /dead: missing, or does not answer"
    ]
    never.set()


def test_staging_is_counted_where_forks_are_made(tmp_path: Path) -> None:
    parent = tmp_path / "vms"
    for name in (".forkvm-0123456789abcdef", ".forkvm-0123456789abcdef.1-2", ".forkvm-fedcba9876543210", "guest"):
        (parent / name).mkdir(parents=True)
    reader = RootReader(str(tmp_path))

    before = reader().stagings
    reader.add(str(parent))
    reader.add("/elsewhere")

    assert (before, reader().stagings) == (0, 2)


@pytest.mark.parametrize(
    ("state", "redis", "root", "alive", "ready"),
    [
        ({}, REDIS, ROOT, [], []),
        ({"is_connected": False}, REDIS, ROOT, [], ["not connected to Redis"]),
        ({}, None, ROOT, [], ["Redis does not answer"]),
        ({}, REDIS, None, [], ["root /guests: missing, or does not answer"]),
        (
            {},
            REDIS,
            RootValues(is_writable=False, free_bytes=0, free_inodes=0, stagings=0),
            [],
            ["root /guests: not writable"],
        ),
        ({"is_stopping": True, "turned_at": -100.0}, REDIS, ROOT, [], ["the worker is ending"]),
    ],
)
def test_health(state: dict[str, Any], redis: object, root: object, alive: list[str], ready: list[str]) -> None:
    health = Health(Consumer(**{"is_connected": True, **state}), _Read(redis), {"/guests": _Read(root)})

    assert health.why_not_alive() == alive
    assert health.why_not_ready() == ready


def test_a_consumer_loop_that_hangs_is_not_alive() -> None:
    consumer = Consumer(is_connected=True)
    consumer.turned_at -= 31
    health = Health(consumer, _Read(REDIS), {"/guests": _Read(ROOT)})

    assert health.why_not_alive() == health.why_not_ready() == ["the consumer loop has not turned for 31 s"]
