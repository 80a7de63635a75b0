"""A server that only decodes, or only prefills: each is a server of its own to an update.

Nothing moves a cache between them on CPU: what decodes is given SGLang's `fake` transfer, with which it makes
up the cache; what prefills has mooncake's, over TCP, and is not asked to generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ckpt_engine.errors import UpdateError
from tests.engines.sglang.parameter_servers import command_line, tensors_of, update_from
from tests.engines.sglang.servers import WAIT, Checkpoints, Server
from tests.integration.conftest import free_port

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=["decode", "prefill"])
def server(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, log: Callable[[str], Path]
) -> Iterator[Server]:
    mode = request.param
    if mode == "prefill":
        pytest.importorskip("mooncake.engine", reason="mooncake is not installed, or libibverbs is missing")
    made = Server(
        *(checkpoints("llama", 1), log(mode), WAIT, "--skip-server-warmup", "--disaggregation-mode", mode),
        *("--disaggregation-transfer-backend", {"decode": "fake", "prefill": "mooncake"}[mode]),
        *("--disaggregation-bootstrap-port", str(free_port())),
        *("--disaggregation-decode-retraction-backup", "cpu_tensor"),
        MOONCAKE_PROTOCOL="tcp",
        SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION="false",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
    )
    with closing(made):
        yield made.wait()


def test_updates_equal_loads_from_disk(server: Server, checkpoints: Checkpoints) -> None:
    assert not server.client.is_ready()
    done = command_line("--checkpoint-path", checkpoints("llama", 1), "--endpoint", server.url)
    assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
    assert server.client.is_ready()
    received = [server.weights()]
    update_from(server, checkpoints("llama", 2), weight_version="second")
    assert server.client.weight_version() == "second"
    received.append(server.weights())
    assert received[0] != received[1]
    for seed in (1, 2):
        server.load_from_disk(checkpoints("llama", seed))
        assert server.weights() == received[seed - 1]


def test_what_is_refused_before_a_byte_moves(server: Server, checkpoints: Checkpoints) -> None:
    update_from(server, checkpoints("llama", 1))
    before = server.weights()
    tensors = tensors_of(checkpoints("llama", 2))
    del tensors["model.norm.weight"]
    with pytest.raises(UpdateError, match=r"does not fill model\.norm\.weight") as caught:
        update_from(server, tensors)
    assert caught.value.touched is False
    assert server.weights() == before
