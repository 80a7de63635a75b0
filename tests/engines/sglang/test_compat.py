"""SGLang's own updater, unchanged, with our modules in place of those that it imports."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ckpt_engine_sglang.sglang_update import app

from tests.engines.sglang.parameter_servers import RANK_SECONDS, update_from
from tests.engines.sglang.servers import Checkpoints, Server, with_stubs

pytestmark = pytest.mark.timeout(600)


def test_ours_has_each_of_its_options() -> None:
    """And no other word for any of them."""
    (package,) = importlib.util.find_spec("sglang").submodule_search_locations  # type: ignore[union-attr, misc]
    source = (Path(package) / "srt/checkpoint_engine/update.py").read_text()
    its = set(re.findall(r'"(--[a-z][a-z-]+)"', source))
    assert {"--checkpoint-path", "--update-method", "--uds"} <= its
    ours = {option for each in typer.main.get_command(app).params for option in each.opts}
    assert its - ours == set()


def own_updater(*arguments: str) -> subprocess.CompletedProcess[str]:
    # What it would do itself without RANK, had it torchrun on its path.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*torchrun, "-m", "sglang.srt.checkpoint_engine.update", "--inference-parallel-size", "1"]
    return subprocess.run(
        [sys.executable, "-m", "ckpt_engine.cli.main", "compat", "--", *command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=RANK_SECONDS,
        env={
            **os.environ,
            "PYTHONPATH": with_stubs(os.environ),
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )


def test_it_updates_a_server(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    update_from(server, checkpoints("llama", 2))
    done = own_updater(
        *("--checkpoint-path", str(checkpoints("llama", 1)), "--endpoint", server.url),
        *("--weight-version", "its own"),
    )
    assert done.returncode == 0, done.stderr
    assert server.state() == disk_server.state()
    assert server.generate()[1] == "its own"


def test_it_hears_of_a_failure(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    update_from(server, checkpoints("llama", 1))
    before = server.state()
    done = own_updater("--checkpoint-path", str(checkpoints("qwen3", 1)), "--endpoint", server.url)
    assert done.returncode != 0
    assert "the model has no place for model.layers.0.self_attn.k_norm.weight" in done.stderr
    assert server.state() == before == disk_server.state()
