"""The engine's side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc import receiver
from ckpt_engine.ipc.receiver import Prepare, Run

__all__ = ["update_weights_from_ipc"]


def update_weights_from_ipc(
    zmq_ctx: zmq.Context[Any],
    zmq_handle: str,
    device_id: int | str | None,
    *,
    run: Run,
    prepare: Prepare | None = None,
    post_hook: Callable[[], object] | None = None,
) -> None:
    """`ckpt_engine.ipc.receiver.update_weights_from_ipc`.

    Args:
        device_id: the device's index; on CPU engines give `"cpu"`.

    Raises:
        ConfigError: the handle carries options, such as what may be left out: nothing is compared here.
    """
    if "#" in zmq_handle:
        raise ConfigError(
            f"this worker knows no options, but was given {zmq_handle.partition('#')[2]}: update without "
            "them (--partial, --ignore)"
        )
    index = device_id if isinstance(device_id, int) else None
    receiver.update_weights_from_ipc(
        zmq_ctx, zmq_handle, index, run=run, prepare=prepare, post_hook=post_hook
    )
