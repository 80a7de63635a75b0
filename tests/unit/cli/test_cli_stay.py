from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from engine_for_cli_tests import Engine


def test_who_stays_leaves_nothing_when_ended(checkpoint: Path, engine: Engine) -> None:
    rank = subprocess.Popen(
        [
            *(sys.executable, "-m", "ckpt_engine.cli.main", "update", "--checkpoint-path", checkpoint),
            *("--endpoint", engine.url, "--sleep-time", "3600"),
        ],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    assert any(line.startswith("staying for") for line in rank.stdout)
    base = Path(os.environ["CKPT_ENGINE_SOCKET_DIR"])
    assert len(list(base.iterdir())) == 1
    rank.terminate()
    rank.communicate(timeout=60)
    assert rank.returncode == 128 + signal.SIGTERM
    assert list(base.iterdir()) == []
