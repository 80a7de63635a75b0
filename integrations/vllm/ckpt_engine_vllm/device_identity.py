"""Which device a vLLM worker runs on, in the words of the parameter servers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ckpt_engine.devices import cpu_uuid
from ckpt_engine.errors import ConfigError
from ckpt_engine.settings import load_settings


def on_npu(worker: Any) -> bool:  # noqa: ANN401 - vLLM's Worker
    """Whether it is vllm-ascend's; up to 0.11 that says nothing of its device."""
    device = getattr(worker, "device", None)
    return find_spec("torch_npu") is not None if device is None else bool(device.type == "npu")


def device_of(worker: Any) -> tuple[str, int | None]:  # noqa: ANN401 - vLLM's Worker
    """The device UUID of a worker, and its index among the devices that the process sees (None on CPU).

    On CPU each tensor parallel rank is a device of its own: its local rank, through CKPT_ENGINE_CPU_DEVICES.

    Raises:
        ConfigError: a device that this version does not know.
    """
    kind = worker.device.type if worker.device is not None else "npu"
    if kind == "cpu":
        return cpu_uuid(load_settings(), worker.local_rank), None
    if kind == "cuda":
        from ckpt_engine.devices.cuda import cuda_uuid

        index = worker.device.index if worker.device.index is not None else worker.local_rank
        return cuda_uuid(load_settings(), index), index
    remedy = ": use the worker extension" if kind == "npu" else ""
    raise ConfigError(f"this way updates vLLM on CUDA and CPU, not on {kind!r}{remedy}")
