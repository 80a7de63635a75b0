"""vLLM's stateless groups as collectives: `--custom-dist vllm_nccl` and `vllm_gloo`.

vLLM's own code makes them, on a store of their own and apart from torch's default group: for processes that
want the communicators (and the nccl library) that vLLM itself uses. A group of some ranks only
(`update(ranks=...)`) is a group of those members alone.

vLLM's StatelessProcessGroup pickles what it sends. All that is sent here is an nccl id, as its bytes.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device
from ckpt_engine.errors import ConfigError
from ckpt_engine.transport.collectives import (
    FORMING_SECONDS,
    GlooCollectives,
    Poll,
    _broken,
    _in_thread,
    _own,
)

_ID_KEY = "nccl-id"


class VllmNcclCollectives:
    """vLLM's PyNcclCommunicator: one CUDA device for each member."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        place: int,
        size: int,
        device_index: int,
        deadline: Deadline,
        poll: Poll,
    ) -> None:
        own = _own(store, prefix)
        # A member that is lost before it has told the id ends the others' wait for it.
        own.set_timeout(_forming(deadline))

        def make() -> Any:  # noqa: ANN401 - vLLM's communicator
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

            device = torch.device("cuda", device_index)
            torch.cuda.set_device(device)
            communicator = PyNcclCommunicator(id_only_group(own, place, size), device)
            if communicator.disabled:
                raise RuntimeError("vLLM found no nccl library, or VLLM_DISABLE_PYNCCL is set")
            return communicator

        self._communicator: Any = _in_thread(make, deadline, poll)

    def broadcast(self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Poll) -> None:
        assert self._communicator is not None
        poll()
        try:
            self._communicator.broadcast(tensor, root, torch.cuda.current_stream(tensor.device))
        except RuntimeError as error:
            raise _broken("a broadcast could not be enqueued", error) from error

    def close(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            # Aborts: releases kernels that wait for a member that will never come.
            communicator.destroy()


class VllmGlooCollectives(GlooCollectives):
    """gloo as vLLM makes it without a default group."""

    def __init__(
        self, store: Store, prefix: str, place: int, size: int, deadline: Deadline, poll: Poll
    ) -> None:
        def make() -> Any:  # noqa: ANN401 - vLLM has no types here
            from vllm.distributed.utils import init_gloo_process_group

            return init_gloo_process_group(_own(store, prefix), place, size, _forming(deadline))

        self._group = _in_thread(make, deadline, poll)


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
) -> VllmNcclCollectives | VllmGlooCollectives:
    """As `collectives.make_group`, for the kinds `vllm_nccl` and `vllm_gloo`."""
    if kind == "vllm_nccl":
        return VllmNcclCollectives(store, name, place, size, device_index, deadline, poll)
    if kind == "vllm_gloo":
        return VllmGlooCollectives(store, name, place, size, deadline, poll)
    raise ConfigError(f"{kind!r}: of vLLM's groups there are vllm_nccl and vllm_gloo")


def id_only_group(store: Store, place: int, size: int) -> Any:  # noqa: ANN401 - vLLM's group
    """A StatelessProcessGroup that does just what PyNcclCommunicator asks of it: to pass on an id."""
    from vllm.distributed.utils import StatelessProcessGroup

    class IdOnlyGroup(StatelessProcessGroup):  # type: ignore[misc]  # vLLM has no types here
        def broadcast_obj(self, obj: Any, src: int) -> Any:  # noqa: ANN401
            """`obj`: a ctypes structure, an empty one on members other than `src`."""
            if self.rank == src:
                self.store.set(_ID_KEY, bytes(obj))
                return obj
            return type(obj).from_buffer_copy(self.store.get(_ID_KEY))

    return IdOnlyGroup(rank=place, world_size=size, store=store)


def _forming(deadline: Deadline) -> timedelta:
    return timedelta(seconds=max(1.0, min(FORMING_SECONDS, deadline.remaining)))
