"""The alerts and the dashboard in deploy/ ask for metrics that there are, with labels that they have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_for_server_tests import EVERYTHING, StubServer, update_error
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from ckpt_engine.errors import UpdateTimeout
from ckpt_engine.server.app import create_app
from ckpt_engine.state import Weights

DEPLOY = Path(__file__).parents[3] / "deploy"
ALERTS = DEPLOY / "prometheus-alerts.yml"
SELECTOR = re.compile(r"(ckpt_engine_\w+)(?:\{([^}]*)\})?")
OF_A_TARGET = {"job", "instance", "le"}
"""Labels that Prometheus adds."""


def expressions() -> Iterator[str]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """The name of every sample, and its labels, of a rank that has done and is doing something."""
    ps = StubServer()
    ps.registered["a"] = []
    ps.weights = Weights("serving", "step-7", "a")
    with TestClient(create_app(ps, access=EVERYTHING)) as client:  # type: ignore[arg-type]
        assert client.post("/v1/checkpoints/a/update", json={}).status_code == 200
        ps.fail["update"] = update_error(UpdateTimeout, error_type="UpdateTimeout")
        assert client.post("/v1/checkpoints/a/update", json={}).status_code == 504
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {"ckpt_engine_busy": {"operation"}, "ckpt_engine_progress_ratio": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", [*expressions()])
def test_they_ask_for_what_there_is(expression: str, samples: dict[str, set[str]]) -> None:
    asked = SELECTOR.findall(expression)
    assert asked
    labels = set().union(*(samples.get(name, set()) for name, _ in asked)) | OF_A_TARGET
    for name, selector in asked:
        assert name in samples
        assert set(re.findall(r"(\w+)\s*=", selector)) <= samples[name] | OF_A_TARGET
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= labels


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    rules: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (`make system`)")
def test_promtool_accepts_the_alerts() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
