"""What SGLang's own handler asks on NPUs: which one this process uses."""

from __future__ import annotations

from ckpt_engine.errors import ConfigError

__all__ = ["npu_generate_uuid"]

_PREFIX = "NPU-"


def npu_generate_uuid() -> str:
    """The current NPU's key (`ckpt_engine_ascend.device_uuid`) without its `NPU-`, which the caller adds.

    Raises:
        IdentityError: it cannot be told.
        ConfigError: CKPT_ENGINE_DEVICE_UUID is one that no caller of this function can arrive at.
    """
    from ckpt_engine_ascend.identity import device_uuid

    key = device_uuid()
    if not key.startswith(_PREFIX):
        raise ConfigError(f"CKPT_ENGINE_DEVICE_UUID={key!r}: SGLang's own begin with {_PREFIX!r}")
    return key.removeprefix(_PREFIX)
