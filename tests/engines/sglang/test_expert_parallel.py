"""A server whose ranks share a model's experts, and which asks for a key; each rank keeps its own experts.

Without its kernels SGLang cannot compute with experts of other ranks: it loads, and tells checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.sglang.parameter_servers import command_line
from tests.engines.sglang.servers import WAIT, Checkpoints, Server

pytestmark = pytest.mark.timeout(900)
KEY = "sesame"


@pytest.fixture(scope="module")
def server(checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[Server]:
    made = Server(
        *(checkpoints("moe", 1), log("expert-parallel"), WAIT, "--ep-size", "2", "--skip-server-warmup"),
        tp_size=2,
        devices="0,1",
        api_key=KEY,
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
        SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION="false",
    )
    try:
        yield made.wait()
    finally:
        made.close()


def test_updates_equal_loads_from_disk(server: Server, checkpoints: Checkpoints, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    refused = command_line("--checkpoint-path", checkpoints("moe", 1), "--endpoint", server.url)
    assert refused.returncode != 0
    assert "wants an API key" in refused.stderr
    assert not server.client.is_ready()
    states = []
    for seed in (1, 2):
        done = command_line(
            *("--checkpoint-path", checkpoints("moe", seed), "--endpoint", server.url),
            *("--api-key-file", key, "--weight-version", f"seed-{seed}"),
        )
        assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
        assert server.client.is_ready()
        assert server.client.weight_version() == f"seed-{seed}"
        received = server.weights()
        server.load_from_disk(checkpoints("moe", seed))
        assert received == server.weights()
        states.append(received)
    assert states[0] != states[1]
    of_ranks = [rank["model.layers.0.mlp.experts.w13_weight"] for rank in states[0]]
    assert len(set(of_ranks)) == 2  # each has experts of its own
