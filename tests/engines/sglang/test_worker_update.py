"""Updates of models that no server on CPU runs: drafts, quantised and fused ones.

Real parameter servers and SGLang's real loading functions, on models of plain torch, behind a scheduler made
up of what is asked of it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_engine_sglang.worker_update import INCOMPLETE, OPTIONS_KEY, WorkerUpdate

from ckpt_engine import ParameterServer
from ckpt_engine.errors import UpdateError

pytestmark = pytest.mark.timeout(120)
NamedTensors = Iterable[tuple[str, torch.Tensor]]
HERE = Path(__file__).parent
SEED = 20261124


@pytest.fixture(scope="module", autouse=True)
def sglang() -> Iterator[None]:
    """SGLang in this process, on CPU."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        patch.syspath_prepend(HERE / "stubs")
        from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

        QuantizeMethodBase.register(Transposing)
        yield


def serve(scheduler: Scheduler, handles: dict[str, str]) -> tuple[bool, str]:
    from sglang.srt.runtime_context import get_parallel

    request = SimpleNamespace(zmq_handles=handles, flush_cache=True, weight_version="new")
    with get_parallel().override(tp_size=1, pp_size=1, ep_size=1):
        return WorkerUpdate(scheduler, request).serve()


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape), requires_grad=False)


class Plain(torch.nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(*shape))
        self.calls: list[list[str]] = []

    def load_weights(self, weights: NamedTensors) -> None:
        parameters, seen = dict(self.named_parameters()), []
        for name, tensor in weights:
            seen.append(name)
            if name in parameters:
                parameters[name].data.copy_(tensor)
        self.calls.append(seen)


class Fused(torch.nn.Module):
    """Joins `a` and `b` when one call gets both."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = parameter(6, 64)
        self.rest = parameter(16, 64)

    def load_weights(self, weights: NamedTensors) -> None:
        given = dict(weights)
        if "a" in given and "b" in given:
            self.fused.data.copy_(torch.cat([given["a"], given["b"]]))
        if "rest" in given:
            self.rest.data.copy_(given["rest"])


class Transposing:
    """Keeps a weight transposed and doubled, which it can undo."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.fails = False

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: ANN401
        self.did.append("process")
        if self.fails:
            raise RuntimeError("cannot process")
        layer.weight.data = (layer.weight.data * 2).t().contiguous()

    def restore_weights_before_loading(self, layer: Any) -> None:  # noqa: ANN401
        self.did.append("restore")
        layer.weight.data = layer.weight.data.t().contiguous() / 2


class Quantised(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.register_parameter("weight", parameter(4, 8))  # as it serves: transposed
        self.layer.quant_method = Transposing()  # type: ignore[assignment]
        self.norm = parameter(4)

    def load_weights(self, weights: NamedTensors) -> None:
        for name, tensor in weights:
            target = dict(self.named_parameters()).get(name)
            if target is not None:
                target.data.copy_(tensor)


@dataclass
class Scheduler:
    """What the handler asks of SGLang's weight updater and scheduler."""

    runners: list[tuple[str, Any]]
    idle: bool = True
    did: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tp_worker = SimpleNamespace(model_runner=self.runners[0][1])
        self.scheduler = SimpleNamespace(is_fully_idle=lambda ignore_waiting: self.idle, _engine_paused=False)

    def _select_runners(self) -> list[tuple[str, Any]]:
        return self.runners

    def record_weight_version_after_update(self, version: str | None) -> None:
        self.did.append(f"version {version}")

    def flush_cache_after_weight_update(self, request: Any, success: bool, message: str) -> tuple[bool, str]:  # noqa: ANN401
        self.did.append("flush")
        return success, message


class OldScheduler(Scheduler):
    """As in SGLang 0.5.21."""

    def flush_cache_after_weight_update(self, request: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        self.did.append("flush")


def runner(model: torch.nn.Module, path: str = "/models/m") -> Any:  # noqa: ANN401
    config = SimpleNamespace(model_path=path, dtype=torch.float32, hf_config=SimpleNamespace())
    return SimpleNamespace(
        model=model, model_config=config, device="cpu", gpu_id=0, weight_updater=SimpleNamespace()
    )


def update(
    scheduler: Scheduler, tensors: dict[str, torch.Tensor], *, slot_nbytes: int = 2**20, **options: object
) -> tuple[bool, str]:
    """One update; the handler's answer. Raises what the parameter server raises."""
    answer: list[tuple[bool, str]] = []

    def ask(paths: list[tuple[str, str]]) -> None:
        answer.append(serve(scheduler, dict(paths) | ({OPTIONS_KEY: json.dumps(options)} if options else {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_SLOT_MIB", str(slot_nbytes / 2**20))
        with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
            ps.register_checkpoint("new", named_tensors=tensors)
            ps.gather_metas("new")
            ps.update("new", ask, timeout=60)
    return answer[0]


def drawn(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_draft_is_loaded_from_the_same_pass() -> None:
    target, draft = Plain(a=(3, 4), b=(5,)), Plain(b=(5,), c=(7,))
    scheduler = Scheduler([("target", runner(target)), ("draft", runner(draft))])
    tensors = drawn(a=(3, 4), b=(5,), c=(7,))
    success, message = update(scheduler, tensors)
    assert success, message
    for model, names in ((target, "ab"), (draft, "bc")):
        for name in names:
            assert torch.equal(getattr(model, name), tensors[name])
    assert scheduler.did == ["version new", "flush"]

    del tensors["c"]
    with pytest.raises(UpdateError, match="the update does not fill c: "):
        update(scheduler, tensors)


def test_a_draft_with_a_checkpoint_of_its_own_is_left_alone() -> None:
    target, draft = Plain(a=(3, 4)), Plain(a=(3, 4))
    scheduler = Scheduler([("target", runner(target)), ("draft", runner(draft, "/models/draft"))])
    assert update(scheduler, drawn(a=(3, 4)))[0]
    assert target.a.any()
    assert not draft.a.any()


def test_tensors_of_one_parameter_that_come_in_different_buckets() -> None:
    model = Fused()
    tensors = drawn(a=(2, 64), b=(4, 64), rest=(16, 64))
    # Named so that the third tensor, and the memory of the first one's slot, lie between them.
    assert update(Scheduler([("target", runner(model))]), tensors, slot_nbytes=1024)[0]
    assert torch.equal(model.fused, torch.cat([tensors["a"], tensors["b"]]))
    assert torch.equal(model.rest, tensors["rest"])


def test_quantised_weights_are_restored_loaded_and_processed() -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    tensors = {"layer.weight": drawn(w=(8, 4))["w"], "norm": torch.ones(4)}
    for _ in range(2):
        assert update(Scheduler([("target", runner(model))]), tensors)[0]
        assert torch.equal(model.layer.weight, (tensors["layer.weight"] * 2).t())
    assert method.did == ["restore", "process"] * 2


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"layer.weight": (8, 4)}, "the update does not fill norm: "),
        ({"layer.weight": (8, 4), "norm": (4,), "other": (4,)}, "the model has no place for other: "),
    ],
)
def test_quantised_weights_that_are_incomplete(tensors: dict[str, tuple[int, ...]], told: str) -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    scheduler = Scheduler([("target", runner(model))])
    with pytest.raises(UpdateError, match=told):
        update(scheduler, {name: torch.ones(shape) for name, shape in tensors.items()})
    assert (method.did[0], method.did[-1]) == ("restore", "process")
    # As the kernels want it: the server goes on, and says what it is.
    assert model.layer.weight.shape == (4, 8)
    assert scheduler.did == [f"version {INCOMPLETE}", "flush"]


def test_post_processing_that_fails() -> None:
    model = Quantised()
    method: Any = model.layer.quant_method
    scheduler = Scheduler([("target", runner(model))])
    method.fails = True
    tensors = {"layer.weight": torch.ones(8, 4), "norm": torch.ones(4)}
    with pytest.raises(UpdateError, match="cannot process"):
        update(scheduler, tensors)
    assert scheduler.did == [f"version {INCOMPLETE}", "flush"]


def test_nothing_is_touched_under_requests_that_run() -> None:
    model = Plain(a=(3,))
    scheduler = Scheduler([("target", runner(model))], idle=False)
    with pytest.raises(UpdateError, match="requests are running or queued"):
        update(scheduler, drawn(a=(3,)))
    assert not model.a.any()
    assert scheduler.did == ["version None", "flush"]


def test_the_flush_of_an_older_sglang() -> None:
    model = Plain(a=(3,))
    scheduler = OldScheduler([("target", runner(model))])
    assert update(scheduler, drawn(a=(3,)))[0]
    assert scheduler.did == ["version new", "flush"]
    with pytest.raises(UpdateError, match="has no place for b"):
        update(scheduler, drawn(a=(3,), b=(1,)))
    assert scheduler.did == ["version new", "flush", "version None", "flush"]


def cached(_: str) -> None:
    raise RuntimeError("the weight cache is active")


def packed(model: Plain) -> Any:  # noqa: ANN401
    model.use_intel_amx_backend = True
    return runner(model)


def in_a_cache(model: Plain) -> Any:  # noqa: ANN401
    made = runner(model)
    made.weight_updater._assert_weight_cache_inactive = cached
    return made


def on_another_device(model: Plain) -> Any:  # noqa: ANN401
    made = runner(model)
    made.device = "xpu"
    return made


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (packed, "packed for AMX"),
        (in_a_cache, "the weight cache is active"),
        (on_another_device, "not on 'xpu'"),
    ],
)
def test_what_cannot_be_updated_is_refused_before_a_byte_moves(
    make: Callable[[Plain], Any], told: str
) -> None:
    model = Plain(a=(3,))
    scheduler = Scheduler([("target", make(model))])
    with pytest.raises(UpdateError, match=told) as caught:
        update(scheduler, drawn(a=(3,)))
    assert caught.value.touched is False
    assert not model.a.any()
    assert scheduler.did == ["version None", "flush"]


@pytest.mark.parametrize("options", ["no JSON", "[]", '{"ignored": 3}'])
def test_options_that_are_none(options: str) -> None:
    scheduler = Scheduler([("target", runner(Plain(a=(3,))))])
    answer: list[tuple[bool, str]] = []

    def ask(paths: list[tuple[str, str]]) -> None:
        answer.append(serve(scheduler, {**dict(paths), OPTIONS_KEY: options}))

    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        ps.register_checkpoint("new", named_tensors=drawn(a=(3,)))
        ps.gather_metas("new")
        with pytest.raises(UpdateError, match=OPTIONS_KEY):
            ps.update("new", ask, timeout=60)
    assert answer[0][0] is False
