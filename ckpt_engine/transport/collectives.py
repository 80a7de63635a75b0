"""Collectives behind one small seam: torch.distributed's backends here, stateless groups beside them."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, ErrorRecord, PeerLost, UpdateTimeout

logger = logging.getLogger(__name__)

SLICE = timedelta(milliseconds=20)
BEYOND_DEADLINE = timedelta(seconds=10)
"""How much later gloo would end a wait by itself: ours names what was waited for."""
FORMING_SECONDS = 60.0
"""How long gloo itself waits for the members of a group, all of whom have just met."""

LOOK_SECONDS = 0.0002
"""Between two looks at what a device does."""
CLOSE_SECONDS = 1.0
"""How long a caller waits for a group to be gone; longer only where a member is stopped."""

_G = TypeVar("_G")

Poll = Callable[[], object]
"""Called while waiting; what it raises ends the wait."""


class Collectives(Protocol):
    """A private group of ranks. All members call in the same order; none touches the default group.

    vLLM's stateless groups (`vllm_groups.py`) are further implementations of this.
    """

    def broadcast(self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Poll) -> None:
        """Broadcasts bytes from member `root` (its place in the group) to all members, in place.

        On return the bytes are there, or, on a device with streams, will be before what the current stream
        does next.

        Raises:
            PeerLost: a member's connection broke.
            UpdateTimeout: the deadline passed.
        """
        ...

    def close(self) -> None:
        """Drops the group: members that still wait in it get an error. Idempotent."""
        ...


class GlooCollectives:
    """gloo on its own prefix of the store; tensors of any device, through host memory.

    Its abort does not release a member that waits in a broadcast, so waits are cut into slices; when a
    member drops the group, its closing connections release the others.
    """

    def __init__(
        self, store: Store, prefix: str, place: int, size: int, deadline: Deadline, poll: Poll
    ) -> None:
        timeout = forming_timeout(deadline)
        made = form_in_thread(
            lambda: dist.ProcessGroupGloo(own_part(store, prefix), place, size, timeout), deadline, poll
        )
        self._group: dist.ProcessGroupGloo | None = made

    def broadcast(self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Poll) -> None:
        if tensor.device.type == "npu":
            # Of all devices that torch knows, gloo itself only reads CPU's and CUDA's.
            host = tensor.cpu()
            self.broadcast(host, root, deadline, poll)
            tensor.copy_(host)
            return
        assert self._group is not None
        options = _options(root)
        options.timeout = _beyond(deadline)
        work = self._group.broadcast([tensor], options)  # type: ignore[attr-defined]
        _wait(work, "a broadcast", "a broadcast between hosts did not end", deadline, poll)

    def exchange(
        self,
        arriving: torch.Tensor,
        leaving: torch.Tensor,
        to_get: list[int],
        to_send: list[int],
        deadline: Deadline,
        poll: Poll,
    ) -> None:
        """Each member sends bytes to each: `leaving` and `arriving` hold what goes to, and comes from, member
        after member; `to_send` and `to_get` say how many bytes of each. Returns when all is there.

        Raises: as `broadcast`.
        """
        assert self._group is not None
        work = _exchange(self._group, arriving, leaving, to_get, to_send, deadline)
        _wait(work, "an exchange", "an exchange did not end", deadline, poll)

    def close(self) -> None:
        held = [self._group]
        self._group = None
        if held[0] is not None:
            # Its destructor waits for what a stopped member has not taken yet. No daemon thread: torch
            # aborts the process if the interpreter goes while one is in there.
            thread = threading.Thread(target=held.clear, name="ckpt-engine-group-end")
            thread.start()
            thread.join(CLOSE_SECONDS)


class DeviceGroup:
    """What groups of devices with streams have in common: a broadcast is only enqueued, on the current one.

    A kind forms its group, which may take until the last member comes, so in a thread of its own; enqueues a
    broadcast; and ends a group in which others may still wait.
    """

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
        self._index = device_index
        timeout = _beyond(deadline)
        self._group: Any = form_in_thread(
            lambda: self._form(own_part(store, prefix), place, size, timeout), deadline, poll, self._end
        )

    def broadcast(self, tensor: torch.Tensor, root: int, deadline: Deadline, poll: Poll) -> None:
        assert self._group is not None
        poll()
        try:
            self._enqueue(tensor, root)
        except RuntimeError as error:
            raise broken("a broadcast could not be enqueued", error) from error

    def exchange(
        self,
        arriving: torch.Tensor,
        leaving: torch.Tensor,
        to_get: list[int],
        to_send: list[int],
        deadline: Deadline,
        poll: Poll,
    ) -> None:
        """As of `GlooCollectives`."""
        assert self._group is not None
        module = torch.get_device_module(arriving.device)
        try:
            _exchange(self._group, arriving, leaving, to_get, to_send, deadline).wait()
            end = module.current_stream(arriving.device).record_event()
            while not end.query():
                poll()
                if deadline.passed:
                    raise _late("an exchange did not end")
                time.sleep(LOOK_SECONDS)
        except RuntimeError as error:
            raise broken("an exchange broke", error) from error

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            self._end(group)

    def _form(self, store: Store, place: int, size: int, timeout: timedelta) -> object:
        """The group, with its communicator: what the first collective would make is made here, where a lost
        member can be noticed. `timeout`: when the group itself may give up, beyond our own deadline."""
        raise NotImplementedError

    def _enqueue(self, tensor: torch.Tensor, root: int) -> None:
        # Waiting for the work only makes the current stream wait.
        self._group.broadcast([tensor], _options(root)).wait()

    def _end(self, group: Any) -> None:  # noqa: ANN401 - each kind's own
        raise NotImplementedError


class NcclCollectives(DeviceGroup):
    """nccl on its own prefix of the store: one CUDA device for each member."""

    def _form(self, store: Store, place: int, size: int, timeout: timedelta) -> object:
        device = torch.device("cuda", self._index)
        options = dist.ProcessGroupNCCL.Options()
        # Our own watcher aborts; nccl's must not take the process down with it.
        options._timeout = timeout
        torch.cuda.set_device(device)
        group = dist.ProcessGroupNCCL(store, place, size, options)
        group.eager_connect_single_device(device)
        return group

    def _end(self, group: Any) -> None:  # noqa: ANN401
        # Releases kernels that wait for a member that will never come.
        group.abort()


class HcclCollectives(DeviceGroup):
    """hccl on its own prefix of the store: one NPU for each member.

    Its ports may be those of the engine's own communicator on the same NPU: see
    integrations/ascend/README.md.
    """

    def _form(self, store: Store, place: int, size: int, timeout: timedelta) -> object:
        npu = npu_with_ports()
        kind = importlib.import_module("torch_npu._C._distributed_c10d").ProcessGroupHCCL
        options = kind.Options()
        options._timeout = timeout
        options.is_high_priority_stream = False
        npu.set_device(self._index)
        group = kind(store, place, size, options)
        first = torch.zeros(1, dtype=torch.uint8, device=torch.device("npu", self._index))
        group.broadcast([first], _options(0)).wait()
        npu.current_stream(self._index).synchronize()
        return group

    def _end(self, group: Any) -> None:  # noqa: ANN401
        # Releases what waits on the device for a member that will never come.
        group.abort_hccl_comm("ckpt-engine drops the group")


def npu_with_ports() -> Any:  # noqa: ANN401 - torch.npu has no types
    """`torch.npu`, and a warning where hccl's ports may be the engine's."""
    from ckpt_engine.devices.npu import load
    from ckpt_engine.devices.npu_environment import port_problem

    problem = port_problem(os.environ)
    if problem:
        logger.warning("%s: %s", *problem)
    return load()


def make_group(
    kind: str,
    store: Store,
    name: str,
    place: int,
    size: int,
    device_index: int,
    deadline: Deadline,
    poll: Poll,
) -> Collectives:
    """A group of `size` members, of which this one is number `place`; all of them call it with one `name`.

    Raises:
        PeerLost: a member is gone.
        UpdateTimeout: not all came by the deadline.
    """
    if kind.startswith("vllm_"):
        from ckpt_engine.transport.vllm_groups import make_vllm_group

        return make_vllm_group(kind, store, name, place, size, device_index, deadline, poll)
    return make_own_group(kind, store, name, place, size, device_index, deadline, poll)


def make_own_group(
    kind: str,
    store: Store,
    name: str,
    place: int,
    size: int,
    device_index: int,
    deadline: Deadline,
    poll: Poll,
) -> GlooCollectives | DeviceGroup:
    """As `make_group`, but for the kinds `nccl`, `hccl` and `gloo` only, which can exchange, too."""
    if kind == "nccl":
        return NcclCollectives(store, name, place, size, device_index, deadline, poll)
    if kind == "hccl":
        return HcclCollectives(store, name, place, size, device_index, deadline, poll)
    return GlooCollectives(store, name, place, size, deadline, poll)


def own_part(store: Store, prefix: str) -> Store:
    """The group's part of the store through a connection of its own: a client serves one call at a time, and
    a group that is never completed waits in one."""
    return PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]


def _exchange(
    group: Any,  # noqa: ANN401 - torch's
    arriving: torch.Tensor,
    leaving: torch.Tensor,
    to_get: list[int],
    to_send: list[int],
    deadline: Deadline,
) -> Any:  # noqa: ANN401 - torch's work
    """Begins it."""
    options = dist.AllToAllOptions()
    options.timeout = _beyond(deadline)
    return group.alltoall_base(arriving, leaving, to_get, to_send, options)


def _wait(
    work: Any,  # noqa: ANN401 - gloo's
    what: str,
    late: str,
    deadline: Deadline,
    poll: Poll,
) -> None:
    """Waits in slices. Raises PeerLost, UpdateTimeout, and what `poll` raises."""
    while not work.is_completed():
        # A slice that times out raises, as a broken connection does: is_completed() tells them apart.
        with contextlib.suppress(RuntimeError):
            work.wait(SLICE)
        poll()
        if deadline.passed and not work.is_completed():
            raise _late(late)
    try:
        work.wait()
    except RuntimeError as error:
        raise broken(f"{what} broke", error) from error


def _beyond(deadline: Deadline) -> timedelta:
    """For a group's own timeout: it outlives the call that made it, and may be shorter than this deadline."""
    return timedelta(seconds=deadline.remaining) + BEYOND_DEADLINE


def _options(root: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = root
    options.rootTensor = 0
    return options


def forming_timeout(deadline: Deadline) -> timedelta:
    return timedelta(seconds=max(1.0, min(FORMING_SECONDS, deadline.remaining)))


def form_in_thread(
    make: Callable[[], _G], deadline: Deadline, poll: Poll, end: Callable[[_G], object] | None = None
) -> _G:
    """Makes a group in a thread: making it waits for every member, and cannot be interrupted.

    After an abort the thread stays behind until torch's own timeout ends it. A group that comes after all is
    nobody's: `end` ends it, where dropping it is not enough.
    """
    made: list[_G] = []
    failed: list[Exception] = []
    given_up = threading.Event()
    lock = threading.Lock()

    def run() -> None:
        try:
            group = make()
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            failed.append(error)
            return
        with lock:
            if not given_up.is_set():
                made.append(group)
                return
        _end_unwanted(group, end)

    thread = threading.Thread(target=run, name="ckpt-engine-group", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(SLICE.total_seconds())
            poll()
            if deadline.passed and thread.is_alive():
                raise _late("the ranks did not form a group")
    except BaseException:
        with lock:
            given_up.set()
        for group in made:
            _end_unwanted(group, end)
        raise
    if failed and isinstance(failed[0], ConfigError):
        raise failed[0]
    if failed:
        raise broken("the ranks could not form a group", failed[0]) from failed[0]
    return made[0]


def _end_unwanted(group: _G, end: Callable[[_G], object] | None) -> None:
    if end is None:
        return
    try:
        end(group)
    except Exception as error:  # noqa: BLE001 - what ended the wait for it is the error
        logger.warning("while a group ended that nobody waited for any more: %s", error)


def _late(message: str) -> UpdateTimeout:
    return UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))


def broken(what: str, error: Exception) -> PeerLost:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return PeerLost(ErrorRecord(error_type="PeerLost", message=f"{what}: {first_line}"))
