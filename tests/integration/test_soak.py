"""A hundred checkpoints, one after the other: nothing grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT


def test_nothing_grows_over_100_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-m", "benchmarks.soak", "--device", "cpu", "--ranks", "2", "--gib", "0.03", "--cycles", "100"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
    *moments, summary = map(json.loads, done.stdout.splitlines())
    assert [(moment["cycle"], moment["rank"]) for moment in moments] == [
        (cycle, rank) for cycle in range(10, 101, 10) for rank in range(2)
    ]
    assert summary["flat"] is True
