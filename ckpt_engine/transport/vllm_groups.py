"""vLLM's stateless groups as collectives: `--custom-dist vllm_nccl`, `vllm_gloo`, `vllm_hccl`.

vLLM's own code, or vllm-ascend's, makes them, on a store of their own and apart from torch's default group:
for processes that want the communicators (and the libraries) that the engine itself uses. A group of some
ranks only (`update(ranks=...)`) is a group of those members alone.

vLLM's StatelessProcessGroup pickles what it sends. All that is sent here is a communicator's id, as bytes.
"""

from __future__ import annotations

import importlib
import logging
import threading
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch._C._distributed_c10d import Store

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device
from ckpt_engine.errors import ConfigError
from ckpt_engine.transport.collectives import (
    CLOSE_SECONDS,
    FORMING_SECONDS,
    Collectives,
    DeviceGroup,
    GlooCollectives,
    Poll,
    form_in_thread,
    forming_timeout,
    npu_with_ports,
    own_part,
)

logger = logging.getLogger(__name__)


class VllmNcclCollectives(DeviceGroup):
    """vLLM's PyNcclCommunicator: one CUDA device for each member."""

    def _form(self, store: Store, place: int, size: int, timeout: timedelta) -> object:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        # A member that is lost before it has told the id ends the others' wait for it.
        store.set_timeout(min(timeout, timedelta(seconds=FORMING_SECONDS)))
        device = torch.device("cuda", self._index)
        torch.cuda.set_device(device)
        communicator = PyNcclCommunicator(id_only_group(StatelessProcessGroup, store, place, size), device)
        if communicator.disabled:
            raise RuntimeError("vLLM found no nccl library, or VLLM_DISABLE_PYNCCL is set")
        made: object = communicator
        return made

    def _enqueue(self, tensor: torch.Tensor, root: int) -> None:
        self._group.broadcast(tensor, root, torch.cuda.current_stream(tensor.device))

    def _end(self, group: Any) -> None:  # noqa: ANN401
        # Aborts: releases kernels that wait for a member that will never come.
        group.destroy()


class VllmHcclCollectives(DeviceGroup):
    """hccl through vllm-ascend's own communicator: nothing of torch.distributed's but our store.

    It cannot be aborted: a broadcast whose root is gone ends at HCCL_EXEC_TIMEOUT: NpuDevice wants it set.
    """

    def _form(self, store: Store, place: int, size: int, timeout: timedelta) -> object:
        npu = npu_with_ports()
        try:
            kind = importlib.import_module("vllm_ascend.distributed.device_communicators.pyhccl")
            stateless = importlib.import_module("vllm.distributed.utils").StatelessProcessGroup
        except ImportError as error:
            raise ConfigError(
                f"CKPT_ENGINE_CUSTOM_DIST=vllm_hccl needs vllm and vllm-ascend in this process: {error}"
            ) from error
        # A member that is lost before it has told the id ends the others' wait for it.
        store.set_timeout(min(timeout, timedelta(seconds=FORMING_SECONDS)))
        npu.set_device(self._index)
        group = id_only_group(stateless, store, place, size)
        # In two steps: what it has made before it fails is to be ended.
        made = object.__new__(kind.PyHcclCommunicator)
        try:
            made.__init__(group, torch.device("npu", self._index))
        except Exception:
            _end_communicator(made, self._index)
            raise
        if made.disabled:
            # Its broadcasts would do nothing, in silence.
            raise ConfigError("vllm-ascend cannot load hccl's library: set HCCL_SO_PATH")
        return made

    def _enqueue(self, tensor: torch.Tensor, root: int) -> None:
        stream = cast(Any, torch).npu.current_stream(self._index)
        # Without a stream it takes the one that was current when vllm-ascend first asked.
        self._group.broadcast(tensor, root, stream=stream)

    def _end(self, group: Any) -> None:  # noqa: ANN401
        # Ending it waits for what is enqueued; the process must not wait with it.
        thread = threading.Thread(
            target=_end_communicator, args=(group, self._index), name="ckpt-engine-group-end", daemon=True
        )
        thread.start()
        thread.join(CLOSE_SECONDS)


def _end_communicator(communicator: Any, index: int) -> None:  # noqa: ANN401
    """Destroys what hccl holds of it: memory of the device, and a port. It must not be in use by then; and a
    new thread has no device of its own yet."""
    npu = cast(Any, torch).npu
    try:
        npu.set_device(index)
        npu.synchronize(index)
    except RuntimeError as error:  # such as that of a broadcast whose root is gone
        logger.warning("npu:%d, before a communicator ends: %s", index, error)
    try:
        if hasattr(communicator, "close"):
            communicator.close()
        elif hasattr(communicator, "comm"):  # no release of vllm-ascend up to 0.26 has an end of its own
            communicator.hccl.hcclCommDestroy(communicator.comm)
    except Exception as error:  # noqa: BLE001 - what it failed of before is the error
        logger.warning("hccl, while a communicator ended: %s", str(error) or type(error).__name__)


class VllmGlooCollectives(GlooCollectives):
    """gloo as vLLM makes it without a default group."""

    def __init__(
        self, store: Store, prefix: str, place: int, size: int, deadline: Deadline, poll: Poll
    ) -> None:
        timeout = forming_timeout(deadline)

        def make() -> Any:  # noqa: ANN401 - vLLM has no types here
            from vllm.distributed.utils import init_gloo_process_group

            return init_gloo_process_group(own_part(store, prefix), place, size, timeout)

        self._group = form_in_thread(make, deadline, poll)


def check_custom_dist(kind: str, device: Device) -> None:
    """Raises ConfigError where groups of `kind` (vllm_nccl, vllm_gloo) cannot be had."""
    if kind == "vllm_nccl" and device.collectives != "nccl":
        raise ConfigError(f"custom_dist={kind}: needs CUDA devices, and this rank's is {device.type}")
    if find_spec("vllm") is None:
        raise ConfigError(f"custom_dist={kind}: vLLM is not installed in this environment")


def make_vllm_group(
    kind: str,
    store: Store,
    name: str,
    place: int,
    size: int,
    device_index: int,
    deadline: Deadline,
    poll: Poll,
) -> Collectives:
    """As `collectives.make_group`, for the kinds `vllm_nccl`, `vllm_hccl` and `vllm_gloo`."""
    if kind == "vllm_nccl":
        return VllmNcclCollectives(store, name, place, size, device_index, deadline, poll)
    if kind == "vllm_hccl":
        return VllmHcclCollectives(store, name, place, size, device_index, deadline, poll)
    if kind == "vllm_gloo":
        return VllmGlooCollectives(store, name, place, size, deadline, poll)
    raise ConfigError(f"{kind!r}: of vLLM's groups there are vllm_nccl, vllm_hccl and vllm_gloo")


def id_only_group(base: Any, store: Store, place: int, size: int) -> Any:  # noqa: ANN401 - vLLM's group
    """What the communicators ask of a StatelessProcessGroup: two numbers, and a way to hand on an id (a
    ctypes structure, an empty one on members other than `src`). vLLM's own pickles it, on one more port."""

    def broadcast_obj(self: Any, obj: Any, src: int) -> Any:  # noqa: ANN401
        if src == place:
            store.set("id", bytes(obj))  # type: ignore[arg-type]  # torch takes bytes, too
            return obj
        return type(obj).from_buffer_copy(store.get("id"))

    # Not made by its own constructor, whose fields differ between versions.
    group: Any = object.__new__(type("StoreGroup", (base,), {"broadcast_obj": broadcast_obj}))
    group.rank, group.world_size = place, size
    return group
