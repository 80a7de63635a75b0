"""Configs that tie the output embedding to the input embedding: vLLM goes by what the checkpoint has, older
ones tie them."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ckpt_engine_vllm.tying import Head, Tying
from safetensors.torch import load_file, save_file

from ckpt_engine.errors import ConfigError, UpdateError
from ckpt_engine.loading.recording import Recording
from tests.engines.vllm.engines import SEEDS, Answers, Checkpoints, OfflineEngine
from tests.engines.vllm.parameter_servers import update_from

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
KINDS = ("none", "same", "other")
"""What a checkpoint has as its lm_head: none, a copy of the embedding, or one of its own."""
BY_CHECKPOINT = any(
    Path(directory, "model_executor/model_loader/weight_tying.py").exists()
    for directory in importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr]
)
by_checkpoint = pytest.mark.skipif(not BY_CHECKPOINT, reason="this vLLM ties whatever the checkpoint has")


@dataclass
class Heads:
    """The tied checkpoints with each kind of head, and what vLLM answers when it loads them itself."""

    engine: OfflineEngine
    paths: dict[str, Path]
    expected: dict[str, Answers]


@pytest.fixture(scope="module")
def heads(
    offline: OfflineEngine, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Heads:
    base = tmp_path_factory.mktemp("heads")
    paths = {
        f"{kind} {version}": with_head(
            checkpoints("tied", version), base / f"{kind}-{version}", kind, version
        )
        for kind in KINDS
        for version in "ab"
    }
    expected = {name: offline.from_disk(path) for name, path in paths.items()}
    assert expected["none a"] == expected["same a"]
    assert (expected["none a"] == expected["other a"]) is not BY_CHECKPOINT
    assert (HEAD in expected["other a"].digests[0]) is BY_CHECKPOINT
    assert HEAD not in expected["same a"].digests[0]
    return Heads(offline, paths, expected)


def with_head(source: Path, directory: Path, kind: str, version: str) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    if kind == "same":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if kind == "other":
        noise = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(SEEDS[version]))
        tensors[HEAD] = (0.1 * noise).to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


EVERY_STEP = ("none", "other", "same", "other", "other", "none", "same", "none")


@by_checkpoint
@pytest.mark.parametrize(
    ("start", "load_format", "steps"),
    [
        ("none", "auto", EVERY_STEP),
        ("same", "auto", ("other", "none")),
        ("other", "auto", ("none", "same")),
        ("other", "dummy", ("other", "none")),
    ],
)
def test_a_head_comes_apart_and_back_as_the_checkpoints_have_it(
    heads: Heads, start: str, load_format: str, steps: tuple[str, ...]
) -> None:
    """Between dummy weights vLLM sees no difference, so that an engine that starts with them is tied."""
    heads.engine.start(heads.paths[f"{start} a"], load_format=load_format)
    for number, step in enumerate(steps):
        name = f"{step} {'ba'[number % 2]}"
        update_from(heads.engine, heads.paths[name], slot_nbytes=9000)
        assert heads.engine.answers() == heads.expected[name], (number, name)


@by_checkpoint
def test_a_head_alone_is_not_a_checkpoint_but_may_be_a_part(heads: Heads) -> None:
    heads.engine.start(heads.paths["none a"])
    tensors = load_file(heads.paths["other b"] / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    with pytest.raises(UpdateError, match=f"WeightsMismatch.*{EMBEDDING}") as caught:
        update_from(heads.engine, without)
    assert caught.value.touched is False
    assert heads.engine.answers() == heads.expected["none a"]
    update_from(heads.engine, {HEAD: tensors[HEAD]}, partial=True)
    (found,) = heads.engine.rpc("test_digests")
    assert found[HEAD] == heads.expected["other b"].digests[0][HEAD]
    assert found[EMBEDDING] == heads.expected["none a"].digests[0][EMBEDDING]


@pytest.mark.skipif(BY_CHECKPOINT, reason="this vLLM decides by the checkpoint")
@pytest.mark.parametrize("kind", ["same", "other"])
def test_an_older_vllm_is_not_sent_a_head(heads: Heads, kind: str) -> None:
    heads.engine.start(heads.paths["none a"])
    with pytest.raises(UpdateError, match=f"WeightsMismatch.*{HEAD}") as caught:
        update_from(heads.engine, heads.paths[f"{kind} b"])
    assert caught.value.touched is False
    assert heads.engine.answers() == heads.expected["none a"]


def test_a_head_that_is_ignored_stays_tied(heads: Heads) -> None:
    heads.engine.start(heads.paths["none a"], load_format="dummy")
    update_from(heads.engine, heads.paths["other b"], ignored=[HEAD])
    assert heads.engine.answers() == heads.expected["none b"]


def _tying(
    *, tied: bool, sent: bool, drafter: bool = False, eager: bool = True, by_checkpoint: bool = True
) -> Tying:
    embedding = SimpleNamespace(weight=torch.nn.Parameter(torch.ones(4, 2)))
    module = SimpleNamespace(weight=embedding.weight if tied else torch.nn.Parameter(torch.zeros(4, 2)))
    recording = Recording({name: torch.empty(4, 2, device="meta") for name in (HEAD, EMBEDDING)})
    for name in (HEAD, EMBEDDING) if sent else (EMBEDDING,):
        recording.parameters[name].regions[(0, (4, 2), (2, 1))] = 8
    config = SimpleNamespace(
        speculative_config=SimpleNamespace() if drafter else None,
        model_config=SimpleNamespace(enforce_eager=eager),
    )
    head = Head("lm_head", module, "model.embed_tokens", embedding, by_checkpoint=by_checkpoint)
    return Tying(head, recording, config)


@pytest.mark.parametrize(
    ("tied", "sent", "message"),
    [
        (True, True, r"tied to model.embed_tokens.weight.*has one of its own.*ignored=\['lm_head.weight'\]"),
        (False, False, r"apart from model.embed_tokens.weight.*has none"),
    ],
)
def test_what_a_drafters_graphs_may_hold_is_not_moved(tied: bool, sent: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*--enforce-eager"):
        _tying(tied=tied, sent=sent, drafter=True, eager=False)
    assert _tying(tied=tied, sent=sent, drafter=True).moving == {HEAD}
    assert _tying(tied=tied, sent=sent, eager=False).moving == {HEAD}


@pytest.mark.parametrize(("tied", "sent"), [(True, True), (False, False)])
def test_a_vllm_that_ties_whatever_a_checkpoint_has(tied: bool, sent: bool) -> None:
    with pytest.raises(ConfigError, match="use a newer vLLM"):
        _tying(tied=tied, sent=sent, by_checkpoint=False)
    assert _tying(tied=True, sent=False, by_checkpoint=False).moving == set()
