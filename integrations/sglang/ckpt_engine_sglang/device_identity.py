"""Which device one of SGLang's model runners is on, in the words of the parameter servers."""

from __future__ import annotations

from typing import Any

from ckpt_engine.devices import cpu_uuid
from ckpt_engine.errors import ConfigError
from ckpt_engine.settings import load_settings


def device_of(runner: Any) -> tuple[str, int | None]:  # noqa: ANN401 - SGLang's ModelRunner
    """The device UUID of a runner, and its index among the devices that the process sees (None on CPU).

    On CPU each tensor parallel rank is a device of its own: SGLang numbers them like GPUs, and
    CKPT_ENGINE_CPU_DEVICES says which ones of the host they are.

    Raises:
        ConfigError: a device that this version does not know.
    """
    if runner.device == "cpu":
        return cpu_uuid(load_settings(), runner.gpu_id), None
    if runner.device == "cuda":
        import torch

        from ckpt_engine.devices.cuda import cuda_uuid

        index = torch.cuda.current_device()
        return cuda_uuid(load_settings(), index), index
    raise ConfigError(f"this version updates SGLang on CUDA and CPU, not on {runner.device!r}")
