"""Checkpoints from a seed, dummy weights, loading by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ckpt_engine.embedded_engine import model as models
from ckpt_engine.embedded_engine.model import WeightsMismatch
from ckpt_engine.errors import CheckpointError

PROMPT = [1, 17, 42, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    models.make_checkpoint(directory, seed=3, size="tiny")
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_a_checkpoint_is_sharded_tied_and_small(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "lm_head.weight" not in index["weight_map"]
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = tensors_of(checkpoint)
    assert tensors.keys() == index["weight_map"].keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 2e6


def test_the_seed_alone_decides(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    models.make_checkpoint(tmp_path / "same", seed=3, size="tiny")
    models.make_checkpoint(tmp_path / "other", seed=4, size="tiny")
    assert models.file_digests(tmp_path / "same") == models.file_digests(checkpoint)
    ours, others = models.file_digests(checkpoint)[0], models.file_digests(tmp_path / "other")[0]
    assert all(ours[name] != others[name] for name in ours)


def test_an_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny, small"):
        models.make_checkpoint(tmp_path, seed=0, size="huge")  # type: ignore[arg-type]


def test_dummy_weights_need_config_json_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    model = models.load_dummy(tmp_path, seed=5)
    digests = models.parameter_digests(model)
    expected, _ = models.file_digests(checkpoint)
    assert digests.keys() == expected.keys()
    assert all(digests[name] != expected[name] for name in expected)
    assert digests == models.parameter_digests(models.load_dummy(tmp_path, seed=5))


def test_loading_makes_the_model_the_one_on_disk(checkpoint: Path) -> None:
    reference = models.generate_greedily(models.load_from_disk(checkpoint), PROMPT, 16)
    model = models.load_dummy(checkpoint, seed=5)
    before = models.generate_greedily(model, PROMPT, 16)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    # Two calls, as an update of two buckets makes them.
    tensors = sorted(tensors_of(checkpoint).items())
    models.load_weights(model, tensors[:7])
    models.load_weights(model, iter(tensors[7:]))
    assert models.parameter_digests(model) == models.file_digests(checkpoint)[0]
    assert models.generate_greedily(model, PROMPT, 16) == reference != before
    # In place: the tied head and captured graphs see the new bytes.
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() == embeddings.weight.data_ptr()


def test_a_file_with_the_tied_head_is_accepted(checkpoint: Path) -> None:
    model = models.load_dummy(checkpoint, seed=5)
    embeddings = tensors_of(checkpoint)["model.embed_tokens.weight"]
    models.load_weights(model, [("lm_head.weight", embeddings)])
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.zeros(1), "no parameter 'model.layers.9"),
        ("model.norm.weight", torch.zeros(63, dtype=torch.bfloat16), r"shape \[63\].*\[64\]"),
        ("model.norm.weight", torch.zeros(64), "float32.*bfloat16"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.int16), "int16.*bfloat16"),
    ],
)
def test_a_tensor_that_does_not_fit_leaves_the_model_alone(
    checkpoint: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    model = models.load_dummy(checkpoint, seed=5)
    before = models.parameter_digests(model)
    good = ("model.embed_tokens.weight", tensors_of(checkpoint)["model.embed_tokens.weight"])
    with pytest.raises(WeightsMismatch, match=message) as caught:
        models.load_weights(model, [good, (name, tensor)])
    assert isinstance(caught.value, KeyError)
    assert models.parameter_digests(model) == before


def test_generation_depends_on_every_parameter(checkpoint: Path) -> None:
    model = models.load_dummy(checkpoint, seed=5)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        before = model(input_ids=ids).logits.clone()
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1.5)
            assert not torch.equal(model(input_ids=ids).logits, before), name
            parameter.copy_(kept)


def test_digests_are_of_the_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert models.digest(tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert models.digest(tensor.T) == hashlib.sha256(tensor.T.numpy().tobytes()).hexdigest()
    assert models.digest(torch.tensor(1.0)) == hashlib.sha256(b"\x00\x00\x80\x3f").hexdigest()
    assert models.digest(torch.empty(0, 3)) == hashlib.sha256(b"").hexdigest()
