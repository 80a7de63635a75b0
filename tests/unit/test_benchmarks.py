"""Every benchmark runs, at a size that says nothing about speed, and prints JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mooncake import need_mooncake

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "arguments", "lines"),
    [
        ("broadcast", ["--mib", "1", "--ranks", "2", "--rounds", "1"], 3),
        ("register", ["--gib", "0.002", "--rounds", "1", "--json"], 4),
        (
            "update",
            ["--gib", "0.01", "--tensor-mib", "1", "--ranks", "2", "--rounds", "1", "--keep-buffers"],
            3,
        ),
        (
            "join",
            ["--size", "tiny", "--joiners", "2", "--rounds", "1", "--tokens", "1", "--seconds", "0.5"],
            3,
        ),
        (
            "p2p",
            ["--gib", "0.02", "--receivers", "1", "--piece-mib", "1,4", "--rounds", "1", "--join"],
            3,
        ),
        ("control", ["--ranks", "1,9", "--rounds", "1"], 2),
        ("rounds", ["--ranks", "3,20", "--rounds", "1"], 2),
        ("model", [], 10),
        ("model", ["--cpu", "--gib", "0.05", "--ranks", "1", "--rounds", "1"], 1),
        ("soak", ["--gib", "0.01", "--tensor-mib", "1", "--cycles", "2"], 3),
    ],
)
def test_benchmark_prints_json_lines(module: str, arguments: list[str], lines: int) -> None:
    if module in ("join", "p2p"):
        need_mooncake()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(printed) == lines
    for line in printed:
        assert line["benchmark"] == module
        if "ratio" in line:
            assert line["ratio"] > 0 and line["seconds"] > 0
