from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_engine.timeline.trace import H2D, STAGES, Span, to_json
from tests.support.traces import made_up

Cli = Callable[..., Any]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Two ranks' traces of one update, in a directory."""
    for rank in range(2):
        spans = [
            Span(track=STAGES, name="buckets", begin=10, end=10.002),
            Span(track=H2D, name="bucket 0", begin=10, end=10.001, bucket=0, nbytes=1000),
        ]
        file = tmp_path / f"m.01.rank{rank}.trace.json"
        one = made_up(rank, spans, update="m.01", checkpoint="m\x1b[31m", buckets=1, nbytes=1000)
        file.write_text(to_json([one]))
    return tmp_path


def test_a_page_and_a_picture_lie_beside_the_traces(cli: Cli, traces: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli("report", traces)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "committed; 1000 B in 1 buckets to 2 ranks in 0.002 s" in result.output
    assert result.output.splitlines()[-2:] == [str(traces / "m.01.html"), str(traces / "m.01.png")]
    assert (traces / "m.01.html").read_text().startswith("<!doctype html>")


def test_figures_as_json_with_a_limit(cli: Cli, traces: Path, tmp_path: Path) -> None:
    result = cli("report", *traces.glob("*.json"), "--json", "--limit", "H2D=0.002", "--out", tmp_path / "x")
    figures = json.loads(result.output)
    assert figures["moves"][0]["achieved"] == pytest.approx(0.5, rel=0.01)
    assert figures["files"][0] == str(tmp_path / "x.html")


@pytest.mark.parametrize("limit", ["H2D", "H2D=", "H2D=fast", "H2D=0", "H2D=inf", "h2d=5", "=5"])
def test_a_limit_that_is_none_is_refused(cli: Cli, traces: Path, limit: str) -> None:
    result = cli("report", traces, "--limit", limit)
    assert result.exit_code == 2
    assert "--limit" in result.output


def test_a_place_without_traces_is_an_error(cli: Cli, tmp_path: Path) -> None:
    result = cli("report", tmp_path)
    assert result.exit_code == 1
    assert "no file there ends in .trace.json" in result.output
    result = cli("report", tmp_path / "missing.trace.json")
    assert result.exit_code == 1
    assert "missing.trace.json" in result.output
