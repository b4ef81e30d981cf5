"""The dashboard and the alert rules speak of what a real server's /metrics shows, and of nothing else."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.promql import names_and_labels
from support.serving import PATIENCE, ServerProcess, wait_for

MONITORING = Path(__file__).resolve().parents[1] / "docker" / "monitoring"
DASHBOARDS = sorted(MONITORING.glob("grafana/dashboards/*.json"))
FLEET = MONITORING.parents[1] / "docs" / "fleet.md"
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"]

OF_PROMETHEUS = {"up": frozenset({"job", "instance"})}
"""What Prometheus itself knows of each server that it asks."""
TARGET_LABELS = OF_PROMETHEUS["up"]


def dashboard(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def expressions() -> dict[str, str]:
    """Every expression by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for group in RULES for rule in group["rules"]}
    for path in DASHBOARDS:
        for panel in dashboard(path)["panels"]:
            for target in panel.get("targets", []):
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = target["expr"]
        for variable in dashboard(path)["templating"]["list"]:
            if variable["type"] == "query":
                inside = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert inside, variable
                found[f"{path.stem}: variable {variable['name']}"] = f"sum by ({inside[2]}) ({inside[1]})"
    page = FLEET.read_text(encoding="utf-8").replace("\\|", "|")
    for number, expression in enumerate(re.findall(r"`([^`\n]*pyllm:[^`\n]*)`|^(sum.*pyllm:.*)$", page, re.MULTILINE)):
        found[f"docs/fleet.md {number}"] = "".join(expression)
    return found


@pytest.fixture(scope="module")
def exposed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, frozenset[str]]]:
    """The labels of each series of a server that has answered a request with every kind of work in it."""
    flags = ("--dtype", "float32", "--speculative-config", '{"method": "ngram"}')
    with ServerProcess(tmp_path_factory.mktemp("watched") / "log", str(tiny_checkpoint), *flags) as server:
        body = {"prompt": "abcabcabcabc", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).raise_for_status()

        def series() -> dict[str, frozenset[str]] | None:
            text = httpx.get(f"{server.url}/metrics").raise_for_status().text
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
            found = {sample.name: frozenset(sample.labels) | TARGET_LABELS for sample in samples}
            return found if "pyllm:expert_tokens_total" in found else None

        yield wait_for(series, "the first counts of the experts") | OF_PROMETHEUS


@pytest.mark.parametrize("place", expressions())
def test_an_expression_names_only_what_a_server_exposes(place: str, exposed: dict[str, frozenset[str]]) -> None:
    metrics, labels_at_hand = 0, set()
    for name, labels in names_and_labels(expressions()[place]):
        if name:
            metrics += 1
            assert name in exposed, f"{place}: the server has no {name}"
            labels_at_hand |= exposed[name]
            assert labels <= exposed[name], f"{place}: {name} has no {set(labels - exposed[name])}"
        else:
            assert labels <= labels_at_hand, f"{place}: nothing has {labels - labels_at_hand}"
    assert metrics, f"{place} asks for nothing"


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ('sum by (le) (rate(a:b_bucket{x=~"y{z}", w!="v"}[$__rate_interval])) / c', [
            ("a:b_bucket", {"x", "w"}), ("c", set()), ("", {"le"})]),
        ("max without (x) (a) * on (y) group_left (z) b offset 5m > bool 1e3 # c", [
            ("a", set()), ("b", set()), ("", {"x", "y", "z"})]),
        ("a unless on () up{} == 0x1F and sum(b) by (x)", [("a", set()), ("up", set()), ("b", set()), ("", {"x"})]),
    ],
)  # fmt: skip
def test_expressions_are_read_as_prometheus_reads_them(expression: str, found: list[tuple[str, set[str]]]) -> None:
    assert list(names_and_labels(expression)) == found


@pytest.mark.parametrize("expression", ["sum(a", "ratee(a[5m])", "a ? b", 'a{x="y}'])
def test_what_is_no_expression_is_noticed(expression: str) -> None:
    with pytest.raises(AssertionError):
        list(names_and_labels(expression))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    content = dashboard(path)
    panels = content["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels]
    assert len(titles) == len(set(titles))
    variables = {variable["name"] for variable in content["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(content)))
    assert {name for name in used if not name.startswith("__")} == variables, "no variable is missing or without use"
    for panel in panels:
        if panel["type"] == "row":
            continue
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        assert panel["description"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", "it must work with whatever source is chosen"
            # A legend can show only what the expression has kept of the labels.
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(re.search(rf"\bby \([^)]*\b{name}\b", target["expr"]) for name in shown - TARGET_LABELS)


def test_panels_do_not_lie_on_one_another() -> None:
    for path in DASHBOARDS:
        taken = Counter(
            (x, y)
            for place in (panel["gridPos"] for panel in dashboard(path)["panels"])
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
        assert max(taken.values()) == 1
        assert max(x for x, _ in taken) < 24


def test_alerts_have_names_of_their_own_and_say_what_to_do() -> None:
    rules = [rule for group in RULES for rule in group["rules"]]
    names = [rule["alert"] for rule in rules]
    assert len(names) == len(set(names)) >= 7
    for rule in rules:
        assert rule["for"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert len(rule["annotations"]["description"]) > len(rule["annotations"]["summary"]) > 0
    tested = (MONITORING / "alerts_test.yaml").read_text(encoding="utf-8")
    assert [name for name in names if f'alertname="{name}"' not in tested] == []


def test_compose_mounts_exist_and_images_are_pinned() -> None:
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        sources = [volume.split(":")[0] for volume in service.get("volumes", [])]
        assert [source for source in sources if source.startswith(".") and not (MONITORING / source).exists()] == []
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    provisioned = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    sources = {source["uid"] for source in provisioned["datasources"]}
    for path in DASHBOARDS:
        chosen = [v["current"]["value"] for v in dashboard(path)["templating"]["list"] if v["type"] == "datasource"]
        assert set(chosen) <= sources


@pytest.mark.needs("promtool")  # of the package prometheus
def test_prometheus_accepts_the_rules_and_alerts_fire() -> None:
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
