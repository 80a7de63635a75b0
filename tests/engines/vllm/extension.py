"""Our worker extension with what tests need to see and to break. Names as in the product do not clash."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ckpt_engine_vllm import VllmColocateWorkerExtension, quantisation, worker_update
from ckpt_engine_vllm.rehearsal import rehearse
from ckpt_engine_vllm.reload import Reload
from safetensors.torch import load_file
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from ckpt_engine.ipc.messages import TensorLayout

# Linux lets a process use AMX's tiles once it has asked for them. vLLM 0.32's attention does not ask: oneDNN
# does, for matrices larger than a tiny model's. Without this, workers end by SIGILL on CPUs that have AMX.
if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()


class Extension(VllmColocateWorkerExtension):
    """All of the methods return JSON."""

    def test_digests(self) -> dict[str, str]:
        """SHA-256 of every parameter, and of every weight that a layer keeps packed."""
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            return digests(self.get_model())  # type: ignore[attr-defined]

    def test_addresses(self) -> dict[str, int]:
        """Where each parameter lies, for CUDA graphs know them by that."""
        parameters = self.get_model().named_parameters(remove_duplicate=False)  # type: ignore[attr-defined]
        return {name: parameter.data_ptr() for name, parameter in parameters}

    def test_replays(self) -> int:
        """How often CUDA graphs have run in this process since the first call."""
        return _count_replays()

    def test_kernels(self) -> str:
        """What quantised layers compute with."""
        modules = self.get_model().modules()  # type: ignore[attr-defined]
        kinds = [
            getattr(module, "scheme", None) or getattr(module, "quant_method", None) for module in modules
        ]
        return ", ".join(sorted({quantisation.kernel_of(kind) for kind in kinds if kind is not None}))

    def test_drafter_digests(self) -> dict[str, str]:
        return digests(self.get_draft_model())  # type: ignore[attr-defined]

    def test_free_memory(self) -> int:
        """Bytes of the device that nobody holds."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def test_runner(self) -> str:
        """Which of vLLM's model runners this is."""
        return type(self.model_runner).__module__  # type: ignore[attr-defined]

    def test_modules(self) -> list[str]:
        """What of ours this process has imported."""
        return sorted(name for name in sys.modules if name.startswith("ckpt_engine"))

    def test_echo(self, value: int) -> int:
        return value

    def test_pid(self) -> int:
        return os.getpid()

    def test_fault(
        self, phase: str, bucket: int = 0, rank: int = 0, fifo: str | None = None, raises: bool = True
    ) -> None:
        """The next update fails on `rank`: in phase prepare, run (after bucket) or finish. With `fifo`
        it says by writing to that when it is there, and waits in reading from it; without `raises`, then goes
        on."""
        if self.rank == rank:  # type: ignore[attr-defined]
            _fail_once(phase, bucket, fifo, raises)

    def test_flip(self, name: str) -> None:
        """In the next update a bit of the parameter `name` flips once all is loaded."""
        _flip_once(self.get_model(), name)  # type: ignore[attr-defined]

    def test_clean(self) -> None:
        """Takes back what other methods here have changed and a test that failed has left."""
        for method, original in ORIGINALS.items():
            setattr(worker_update.WorkerUpdate, method, original)
        self.test_pace(0)
        self.test_pairs(False)
        self.test_asleep(None)
        self._weight_update_active = False

    def test_session(self, rank: int, is_open: bool) -> None:
        """Has vLLM's worker `rank` think that a weight update is open, or is not."""
        if self.rank == rank:  # type: ignore[attr-defined]
            self._weight_update_active = is_open

    def test_pace(self, seconds: float) -> None:
        """Each step of generation takes `seconds` longer, as a large model's does."""
        runner = self.model_runner  # type: ignore[attr-defined]
        runner.__dict__.pop("execute_model", None)
        if seconds:
            original, never = runner.execute_model, threading.Event()

            def slowly(*args: object, **kwargs: object) -> object:
                never.wait(seconds)
                return original(*args, **kwargs)

            runner.__dict__["execute_model"] = slowly

    def test_move(self, name: str) -> None:
        """From now on each reload puts the parameter `name` into memory of its own, at the very end."""
        model = self.get_model()  # type: ignore[attr-defined]
        module, _, leaf = name.rpartition(".")
        attention = next(each for each in model.modules() if hasattr(each, "attn_backend"))
        original = attention.process_weights_after_loading

        def moving(*args: object) -> None:
            original(*args)
            parameter = getattr(model.get_submodule(module), leaf)
            parameter.data = parameter.data.clone()

        attention.process_weights_after_loading = moving

    def test_graphs(self, backend: str | None) -> None:
        """Has the engine say that it has full CUDA graphs, and attention by a backend of this name; None:
        what it says of itself."""
        config = self.vllm_config  # type: ignore[attr-defined]
        config.model_config.enforce_eager = backend is None
        mode = CUDAGraphMode.NONE if backend is None else CUDAGraphMode.FULL
        config.compilation_config.cudagraph_mode = mode
        for module in self.get_model().modules():  # type: ignore[attr-defined]
            if hasattr(module, "attn_backend"):
                real = getattr(module.attn_backend, "real", module.attn_backend)
                named = SimpleNamespace(get_name=lambda: backend, real=real)
                module.attn_backend = real if backend is None else named

    def test_balances_experts(self, whether: bool) -> None:
        """Has the engine's config say that experts are moved between ranks; vLLM does not on CPUs."""
        self.vllm_config.parallel_config.enable_eplb = whether  # type: ignore[attr-defined]

    def test_asleep(self, tags: Sequence[str] | None) -> None:
        """Has vLLM's allocator, which there is none of on a CPU, say that what has these tags is asleep."""
        from vllm.device_allocator.cumem import CuMemAllocator

        pieces = [SimpleNamespace(tag=tag, is_asleep=tag in (tags or ())) for tag in ("weights", "kv_cache")]
        allocator = SimpleNamespace(pointer_to_data=dict(enumerate(pieces)))
        CuMemAllocator.instance = None if tags is None else allocator

    def test_pairs(self, wanted: bool) -> None:
        """Whether load_weights passes over gate_proj where it does not get up_proj in the same call: models
        that put several tensors into one parameter may want them all at a time."""
        model = self.get_model()  # type: ignore[attr-defined]
        model.__dict__.pop("load_weights", None)
        if wanted:
            model.__dict__["load_weights"] = lambda tensors: type(model).load_weights(model, _pairs(tensors))

    def test_reload(self, checkpoint: str, borders: Sequence[int]) -> int:
        """Loads a checkpoint in buckets that end at `borders`, all through one slot whose bytes change at
        once after each; the bytes that had to be kept."""
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            config = self.vllm_config.model_config  # type: ignore[attr-defined]
            return reload_through_slot(self.get_model(), config, Path(checkpoint), borders)  # type: ignore[attr-defined]


def _pairs(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    found = dict(tensors)
    return [
        (name, tensor)
        for name, tensor in found.items()
        if "gate_proj" not in name or name.replace("gate_proj", "up_proj") in found
    ]


def digests(model: torch.nn.Module) -> dict[str, str]:
    found = {name: _digest(parameter) for name, parameter in model.named_parameters()}
    # Of quantised attention: the scales of the KV cache are buffers.
    found |= {name: _digest(buffer) for name, buffer in model.named_buffers() if name.endswith("_scale")}
    for name, module in model.named_modules():
        found |= {
            f"{name}.{key}": str(value) for key, value in vars(module).items() if key.endswith("_scale_float")
        }
        method = getattr(module, "quant_method", None)
        if isinstance(module, LinearBase) and not isinstance(method, UnquantizedLinearMethod):
            # What a kernel keeps packed is not to be seen.
            generator = torch.Generator().manual_seed(1)
            inputs = torch.randn(
                4, module.input_size_per_partition, generator=generator, dtype=torch.bfloat16
            )
            found[f"{name} as used"] = _digest(method.apply(module, inputs, getattr(module, "bias", None)))
        linear = getattr(module, "cpu_linear", None)
        widths = ("input_size_per_partition", "input_size", "embedding_dim")
        width = next((getattr(module, each) for each in widths if hasattr(module, each)), None)
        if linear is not None and width is not None:
            # The identity through the layer is its weight, exactly: each sum has one term that is not 0.
            identity = torch.eye(width, dtype=torch.bfloat16)
            found[f"{name} as packed"] = _digest(linear(identity, module.weight, None))
    return found


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def reload_through_slot(
    model: torch.nn.Module,
    model_config: Any,  # noqa: ANN401 - vLLM's
    checkpoint: Path,
    borders: Sequence[int],
) -> int:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    layouts = [
        TensorLayout(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in sorted(tensors.items())
    ]
    slot = torch.zeros(sum(-(-tensor.nbytes // 256) * 256 for tensor in tensors.values()), dtype=torch.uint8)
    reload = Reload(model, model_config, rehearse(model, layouts))
    reload.begin()
    for start, end in zip([0, *borders], [*borders, len(names)], strict=True):
        slot.fill_(0xFF)
        offset, bucket = 0, []
        for name in names[start:end]:
            source = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            place = slot[offset : offset + source.numel()]
            place.copy_(source)
            offset += -(-source.numel() // 256) * 256
            bucket.append((name, place.view(tensors[name].dtype).view(tensors[name].shape)))
        reload.load(bucket)
    slot.fill_(0xFF)
    reload.finish()
    return reload.kept_nbytes


def _count_replays() -> int:
    kind: Any = torch.cuda.CUDAGraph
    original = kind.replay
    if not hasattr(original, "count"):

        def replay(graph: object) -> None:
            replay.count += 1  # type: ignore[attr-defined]
            original(graph)

        replay.count = 0  # type: ignore[attr-defined]
        kind.replay = replay
    return int(kind.replay.count)


ORIGINALS = {name: getattr(worker_update.WorkerUpdate, name) for name in ("_prepare", "_run", "_finish")}


def _flip_once(model: torch.nn.Module, name: str) -> None:
    kind = worker_update.WorkerUpdate
    original: Callable[..., object] = kind._finish

    def flipping(*args: object) -> None:
        setattr(kind, "_finish", original)  # noqa: B010 - a method
        original(*args)
        model.get_parameter(name).data.view(-1).view(torch.uint8)[5] ^= 16

    setattr(kind, "_finish", flipping)  # noqa: B010 - a method


def _fail_once(phase: str, bucket: int, fifo: str | None, raises: bool) -> None:
    kind = worker_update.WorkerUpdate
    method = {"prepare": "_prepare", "run": "_run", "finish": "_finish"}[phase]
    original: Callable[..., object] = getattr(kind, method)
    calls = 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if phase != "run" or calls == bucket + 1:
            setattr(kind, method, original)
            if phase == "run":
                original(*args)
            if fifo is not None:
                Path(fifo).write_text("here")
                Path(fifo).read_text()
            if raises:
                raise RuntimeError(f"injected in {phase}")
            return None
        return original(*args)

    setattr(kind, method, failing)
