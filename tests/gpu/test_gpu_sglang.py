"""A real SGLang server on CUDA: its weights after updates are those that it loads from disk.

SGLang's kernels may be missing (tests/engines/sglang/stubs stand in for what it imports): in their place
it generates with what it computes with PyTorch on other devices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)

from tests.engines.sglang.parameter_servers import command_line
from tests.engines.sglang.servers import WAIT, Checkpoints, Server

pytestmark = pytest.mark.timeout(500)
ARCHITECTURES = ("llama", "moe")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Checkpoints, str]]:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoints = Checkpoints(directory)
    made = Server(
        *(checkpoints(request.param, 1), directory / "server.log", WAIT, "--skip-server-warmup"),
        device="cuda",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
        SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK="1",
        SGLANG_IS_FLASHINFER_AVAILABLE="false",
        SGLANG_NATIVE_OPS="1",
        TORCHDYNAMO_DISABLE="1",
    )
    try:
        yield made.wait(), checkpoints, request.param
    finally:
        print(made.tail(3000))  # noqa: T201 - of a server that nobody sees again
        made.close()


def update(served: Server, model: Path, version: str) -> None:
    done = command_line(
        *("--checkpoint-path", model, "--endpoint", served.url, "--weight-version", version),
        CKPT_ENGINE_HOST_ID=served.host,
    )
    print(done.stdout)  # noqa: T201 - how long each stage took
    assert done.returncode == 0, f"{done.stderr}\n{served.tail()}"
    assert served.client.is_ready()
    assert served.client.weight_version() == version


def test_updates_equal_loads_from_disk(server: tuple[Server, Checkpoints, str]) -> None:
    served, checkpoints, architecture = server
    assert not served.client.is_ready()
    received = []
    for number, seed in enumerate((1, 2, 1)):
        update(served, checkpoints(architecture, seed), f"v{number}")
        received.append(served.weights())
    assert received[0] == received[2] != received[1]
    for seed, weights in ((1, received[0]), (2, received[1])):
        served.load_from_disk(checkpoints(architecture, seed))
        assert served.weights() == weights


def test_tokens_equal_those_of_weights_from_disk(server: tuple[Server, Checkpoints, str]) -> None:
    served, checkpoints, architecture = server
    from_disk = []
    for seed in (1, 2):
        served.load_from_disk(checkpoints(architecture, seed))
        from_disk.append(served.generate(timeout=200)[0])  # the first one compiles kernels
    print(from_disk)  # noqa: T201 - tokens
    assert from_disk[0] != from_disk[1]
    for seed, expected in zip((1, 2), from_disk, strict=True):
        update(served, checkpoints(architecture, seed), f"tokens-{seed}")
        assert served.generate() == (expected, f"tokens-{seed}")
