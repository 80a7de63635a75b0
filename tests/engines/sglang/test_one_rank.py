"""A server with one rank: its first weights, the next ones, and what must not become its weights."""

from __future__ import annotations

import os
import time

import httpx
import pytest
import torch
from ckpt_engine_sglang.worker_update import INCOMPLETE

from ckpt_engine.errors import UpdateError
from tests.engines.sglang.parameter_servers import (
    SocketPaths,
    command_line,
    outcomes,
    tensors_of,
    update_from,
)
from tests.engines.sglang.servers import STALL_SECONDS, Checkpoints, Server

pytestmark = pytest.mark.timeout(600)


class TestFirstWeights:
    """In this order: a server has its first weights once."""

    def test_the_server_waits(self, server: Server) -> None:
        assert not server.client.is_ready()
        answer = server.post("/generate", input_ids=[5], sampling_params={"max_new_tokens": 1})
        assert answer.status_code == 503
        assert "still has its dummy weights" in answer.json()["error"]["message"]
        assert server.status("/v1/models") == 200
        assert server.client.weight_version() == "default"
        info = server.client.info()
        assert (info.worker_count, info.replicas, info.dummy, info.waits_for_weights) == (1, 1, True, True)

    def test_the_command_makes_it_ready(
        self, server: Server, disk_server: Server, checkpoints: Checkpoints
    ) -> None:
        done = command_line(
            *("--checkpoint-path", checkpoints("llama", 1), "--host", "127.0.0.1", "--port", server.port),
            *("--checkpoint-name", "step-1"),
        )
        assert done.returncode == 0, f"{done.stderr}\n{server.tail()}"
        assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == [
            *("register", "health", "gather", "update")
        ]
        assert "dummy" not in done.stderr
        assert server.client.is_ready()
        assert server.state() == disk_server.state()
        assert server.generate()[1] == server.client.weight_version() == "step-1"


def test_one_checkpoint_after_the_other(
    server: Server, disk_server: Server, checkpoints: Checkpoints
) -> None:
    first, second = checkpoints("llama", 1), checkpoints("llama", 2)
    update_from(server, first, weight_version="first")
    before = server.state()
    assert before == disk_server.state()

    # Many buckets: what belongs to one parameter comes in several.
    report = update_from(server, second, slot_nbytes=64 * 1024, weight_version="second")
    assert report.buckets > 5
    disk_server.load_from_disk(second)
    try:
        assert server.state() == disk_server.state()
        assert server.generate()[1] == "second"
        assert server.state() != before
    finally:
        disk_server.load_from_disk(first)

    update_from(server, first, weight_version="first")
    assert server.state() == before


def test_another_dtype_is_converted(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    tensors = {name: tensor.float() for name, tensor in tensors_of(checkpoints("llama", 1)).items()}
    update_from(server, tensors)
    assert server.state() == disk_server.state()


def test_it_is_verified_in_full(server: Server, checkpoints: Checkpoints) -> None:
    """A bit that flips in a parameter once it is loaded is named by the tensor that it belongs to."""
    count = len(tensors_of(checkpoints("llama", 1)))
    told: list[str] = []

    def ask(paths: SocketPaths) -> None:
        told.append(server.client.update(paths, 100))

    update_from(server, checkpoints("llama", 1), verify="full", slot_nbytes=64 * 1024, ask=ask)
    assert f"Verified: {count} as they arrived, {count} as they were loaded." in told[0]
    for parameter, tensor in (("norm", "norm"), ("layers.0.self_attn.qkv_proj", "layers.0.self_attn.q_proj")):
        server.fail(flip=f"model.{parameter}.weight", rank=0)
        with pytest.raises(UpdateError, match=f"tensor 'model.{tensor}.weight' .*was loaded as other bytes"):
            update_from(server, checkpoints("llama", 1), verify="full")
        server.fail()
        assert server.client.weight_version() == INCOMPLETE
    update_from(server, checkpoints("llama", 1), verify="full")


LAYER = "model.layers.0"
WRONG: dict[str, tuple[dict[str, tuple[int, ...] | None], str]] = {
    "layer of another model": ({"model.layers.7.mlp.up_proj.weight": (4,)}, "no place for model.layers.7."),
    "misspelt": ({"model.norm.weights": (128,)}, "no place for model.norm.weights"),
    "no norm": ({"model.norm.weight": None}, "does not fill model.norm.weight"),
    "no head": ({"lm_head.weight": None}, "does not fill lm_head.weight"),
    "no k": ({f"{LAYER}.self_attn.k_proj.weight": None}, f"{LAYER}.self_attn.qkv_proj.weight (only "),
    "no up": ({f"{LAYER}.mlp.up_proj.weight": None}, f"does not fill {LAYER}.mlp.gate_up_proj.weight (only "),
    "no bias": ({f"{LAYER}.self_attn.v_proj.bias": None}, f"{LAYER}.self_attn.qkv_proj.bias (only "),
    "short": ({"model.norm.weight": (127,)}, "cannot load tensor 'model.norm.weight' (float32, [127])"),
    "wide": ({f"{LAYER}.mlp.down_proj.weight": (128, 257)}, f"{LAYER}.mlp.down_proj.weight"),
    "high": ({f"{LAYER}.self_attn.q_proj.weight": (129, 128)}, f"{LAYER}.self_attn.q_proj.weight"),
}  # fmt: skip
"""What is wrong -> tensors of other shapes or (None) left out, and what the error tells."""


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_are_not_the_model_s(server: Server, checkpoints: Checkpoints, wrong: str) -> None:
    update_from(server, checkpoints("llama", 1), weight_version="good")
    before = server.state()
    change, told = WRONG[wrong]
    tensors = {
        **{
            name: tensor for name, tensor in tensors_of(checkpoints("llama", 2)).items() if name not in change
        },
        **{name: torch.zeros(shape) for name, shape in change.items() if shape is not None},
    }
    with pytest.raises(UpdateError) as caught:
        update_from(server, tensors, weight_version="bad")
    assert told in str(caught.value)
    assert caught.value.touched is False
    assert server.state() == before
    assert server.generate()[1] == "good"


def test_what_may_be_left_out(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    first, second = tensors_of(checkpoints("llama", 1)), tensors_of(checkpoints("llama", 2))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}
    update_from(server, {**first, **table, "extra.scale": torch.zeros(1)}, ignored=["extra.*"])
    assert server.state() == disk_server.state()

    norm = {"model.norm.weight": second["model.norm.weight"]}
    update_from(server, norm, partial=True)
    (weights,), (expected,) = server.weights(), disk_server.weights()
    assert {name for name in weights if weights[name] != expected[name]} == {"model.norm.weight"}

    half = {"model.layers.0.mlp.up_proj.weight": second["model.layers.0.mlp.up_proj.weight"]}
    with pytest.raises(UpdateError, match="a module that gets a part of its tensors needs all of them"):
        update_from(server, half, partial=True)
    update_from(server, checkpoints("llama", 1))
    assert server.state() == disk_server.state()


@pytest.mark.parametrize("where", ["load", "post_process"])
def test_the_engine_fails(server: Server, disk_server: Server, checkpoints: Checkpoints, where: str) -> None:
    update_from(server, checkpoints("llama", 1), weight_version="good")
    server.fail(at=where, rank=0, action="raise")
    with pytest.raises(UpdateError, match=f"injected before {where}"):
        update_from(server, checkpoints("llama", 2), weight_version="bad")
    server.fail()
    assert server.client.weight_version() == INCOMPLETE
    answer = server.post("/generate", input_ids=[5], sampling_params={"max_new_tokens": 1})
    assert answer.status_code == 503
    assert "an update failed" in answer.json()["error"]["message"]

    update_from(server, checkpoints("llama", 1), weight_version="good again")
    assert server.state() == disk_server.state()
    assert server.generate()[1] == "good again"


def test_a_handle_that_nobody_serves(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    update_from(server, checkpoints("llama", 1), weight_version="good")
    began = time.monotonic()
    answer = server.post("/update_weights_from_ipc", zmq_handles={"CPU-here-0": "ipc:///nowhere"})
    assert answer.status_code == 400
    assert "nobody listens on ipc:///nowhere" in answer.json()["message"]
    assert time.monotonic() - began < 20
    assert server.state() == disk_server.state()
    assert server.generate()[1] == "good"


def test_no_handle_for_the_server_s_device(
    server: Server, disk_server: Server, checkpoints: Checkpoints
) -> None:
    update_from(server, checkpoints("llama", 1))

    def ask(paths: list[tuple[str, str]]) -> None:
        server.client.update([("CPU-elsewhere-9", paths[0][1])])

    with pytest.raises(UpdateError, match="no handle for device CPU-here-0"):
        update_from(server, checkpoints("llama", 2), ask=ask)
    assert server.state() == disk_server.state()


@pytest.mark.parametrize("kind", ["exit", "stop"])
def test_the_parameter_server_dies_or_falls_silent(
    server: Server, disk_server: Server, checkpoints: Checkpoints, kind: str
) -> None:
    update_from(server, checkpoints("llama", 1), weight_version="good")
    seen = time.monotonic()
    if kind == "exit":
        assert outcomes(server, checkpoints("llama", 2), faults=[{"kind": kind, "after": 100_000}]) == [{}]
    else:
        from tests.engines.sglang.parameter_servers import ranks

        with ranks(server, checkpoints("llama", 2), faults=[{"kind": kind, "after": 100_000}]) as (process,):
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            seen = time.monotonic()
            # The server's scheduler comes back by itself, while the other side is still there.
            answer = server.post("/generate", input_ids=[5], sampling_params={"max_new_tokens": 1})
            assert answer.status_code == 503
            assert server.client.weight_version() == INCOMPLETE
            assert STALL_SECONDS / 2 < time.monotonic() - seen < STALL_SECONDS + 30
    update_from(server, checkpoints("llama", 1), weight_version="good again")
    assert server.state() == disk_server.state()


def test_requests_that_are_running(server: Server, disk_server: Server, checkpoints: Checkpoints) -> None:
    update_from(server, checkpoints("llama", 1), weight_version="good")
    long = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    with (
        httpx.Client(timeout=120) as client,
        client.stream(
            "POST",
            f"{server.url}/generate",
            json={"input_ids": [5, 6, 7], "sampling_params": long, "stream": True},
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        # In place: they stay where they are, and go on later.
        assert server.post("/pause_generation", mode="in_place").status_code == 200
        try:
            with pytest.raises(UpdateError, match="requests are running or queued"):
                update_from(server, checkpoints("llama", 2), weight_version="bad")
            assert server.weights() == disk_server.weights()
            assert server.client.weight_version() == "good"
            # Where what was computed with the old weights may stay, they need not stop.
            update_from(server, checkpoints("llama", 2), weight_version="under them", flush_cache=False)
            assert server.weights() != disk_server.weights()
        finally:
            assert server.post("/continue_generation").status_code == 200
        assert list(lines)[-2].startswith("data:")
    assert server.generate()[1] == "under them"
    update_from(server, checkpoints("llama", 1), weight_version="flushed")
    assert server.state() == disk_server.state()


@pytest.mark.parametrize(
    ("begin", "end", "told"),
    [
        ("/release_memory_occupation", "/resume_memory_occupation", "its weights are released"),
        ("/begin_weight_update", "/end_weight_update", "another weight update is open"),
    ],
)
def test_a_state_in_which_weights_cannot_be_written(
    server: Server, disk_server: Server, checkpoints: Checkpoints, begin: str, end: str, told: str
) -> None:
    update_from(server, checkpoints("llama", 1), weight_version="good")
    body = {"tags": ["weights"]} if begin == "/release_memory_occupation" else {}
    begun = server.post(begin, **body)
    if begun.status_code == 404:
        pytest.skip(f"this SGLang has no {begin}")
    assert begun.status_code == 200, begun.text
    try:
        with pytest.raises(UpdateError, match=told) as caught:
            update_from(server, checkpoints("llama", 2), weight_version="bad")
        assert end in str(caught.value)
        assert caught.value.touched is False
    finally:
        assert server.post(end, **body).status_code == 200
    assert server.state() == disk_server.state()
    assert server.generate()[1] == "good"
    update_from(server, checkpoints("llama", 1), weight_version="after")
    assert server.state() == disk_server.state()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--inference-parallel-size", 2), "has 1 ranks (--tp-size times --pp-size), but 2 ranks would"),
        (("--update-method", "multicast"), "'multicast' is not one of"),
    ],
)
def test_a_command_that_cannot_work(
    server: Server, checkpoints: Checkpoints, options: tuple[object, ...], told: str
) -> None:
    model = checkpoints("llama", 1)
    done = command_line("--checkpoint-path", model, "--endpoint", server.url, *options)
    assert done.returncode != 0
    assert told in done.stderr
