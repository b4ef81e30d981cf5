"""The metrics of several replicas in one text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pyllm.server.replicas.exposition import merge_expositions, sample


def _exposition(number: int) -> str:
    registry = CollectorRegistry()
    Counter("done", "Requests.", ["reason"], registry=registry).labels('a "quoted" } brace').inc(number)
    Gauge("used", "A share.", registry=registry).set(number / 4)
    Histogram("seconds", "Times.", registry=registry, buckets=(1, 2)).observe(number)
    return generate_latest(registry).decode()


def test_every_sample_has_its_replica_and_every_metric_one_type() -> None:
    merged = merge_expositions({"a": _exposition(1), "b": _exposition(3), "dead": ""})
    families = list(text_string_to_metric_families(merged))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    found = {
        (s.name, s.labels["replica"], s.labels.get("reason", ""), s.labels.get("le", "")): s.value
        for family in families for s in family.samples if not s.name.endswith("_created")
    }  # fmt: skip
    assert found["done_total", "a", 'a "quoted" } brace', ""] == 1
    assert found["done_total", "b", 'a "quoted" } brace', ""] == 3
    assert found["seconds_bucket", "b", "", "2.0"] == 0
    assert found["seconds_sum", "b", "", ""] == 3
    assert {family.type for family in families} >= {"counter", "gauge", "histogram"}
    assert merged.count("# TYPE used gauge") == 1


def test_the_samples_of_a_metric_add_up() -> None:
    merged = merge_expositions({"a": _exposition(1), "b": _exposition(3)})
    assert sample(merged, "used") == 1
    assert sample(merged, "done_total") == 4
    assert sample(merged, "other") == 0
