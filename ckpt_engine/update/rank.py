"""What a rank keeps between updates: its place on the control plane, sockets, buffers, groups."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import Device
from ckpt_engine.ipc.sockets import SocketDirectory
from ckpt_engine.planning.planner import Planner
from ckpt_engine.settings import Settings
from ckpt_engine.timeline.recorder import NO_RECORDER, Recorder, TraceRecorder
from ckpt_engine.timeline.trace import About
from ckpt_engine.transport.bootstrap import MeetingPoint
from ckpt_engine.transport.collectives import Collectives
from ckpt_engine.transport.control import Control
from ckpt_engine.update.buffers import Buffers
from ckpt_engine.update.reading import Reading


@dataclass(kw_only=True)
class Rank:
    """`group_name` names the members and the kind of `group`."""

    rank: int
    settings: Settings
    mem_fraction: float
    device: Device
    buffers: Buffers
    reading: Reading
    control: Control
    directory: SocketDirectory
    zmq_ctx: zmq.Context[zmq.Socket[bytes]]
    planner: Planner = field(default_factory=Planner)
    group: Collectives | None = None
    group_name: str = ""

    @classmethod
    def join(
        cls,
        rank: int,
        world_size: int,
        settings: Settings,
        mem_fraction: float,
        device: Device,
        reading: Reading,
        meeting_point: Callable[[SocketDirectory], MeetingPoint],
        deadline: Deadline,
    ) -> Rank:
        """Meets the other ranks at the meeting point.

        Raises:
            ConfigError: rank 0 cannot be reached, or sockets cannot be made.
        """
        directory = SocketDirectory(settings.socket_dir)
        try:
            point = meeting_point(directory)
            if world_size > 1 and device.type != "cpu":
                # Their groups will meet on it: better now than in an update. (On a host's CPUs none is made.)
                _ = point.store
            control = Control(
                point,
                rank=rank,
                world_size=world_size,
                deadline=deadline,
                stall_seconds=settings.stall_timeout,
                port=settings.control_port or 0,
            )
        except BaseException:
            directory.close()
            raise
        return cls(
            rank=rank,
            settings=settings,
            mem_fraction=mem_fraction,
            device=device,
            buffers=Buffers(device),
            reading=reading,
            control=control,
            directory=directory,
            zmq_ctx=zmq.Context(),
        )

    def collectives(self, kind: str) -> str:
        """The kind of group to use where it would be `kind`: vLLM's, if the settings say so."""
        asked = self.settings.custom_dist
        return asked if asked == f"vllm_{kind}" else kind

    def recorder(self, checkpoint_name: str) -> Recorder:
        """What keeps the course of one update, if the settings name a place for it."""
        directory = self.settings.trace_dir
        if directory is None:
            return NO_RECORDER
        about = About(
            update=f"not-met-{secrets.token_hex(4)}",
            checkpoint=checkpoint_name,
            rank=self.rank,
            host=self.settings.host_id,
            device=self.device.uuid(),
            device_type=self.device.type,
            clock=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        )
        return TraceRecorder(directory, about, self.device)

    def drop_groups(self) -> None:
        """Groups are not used again after an abort: a member may still wait in them."""
        group, self.group, self.group_name = self.group, None, ""
        if group is not None:
            group.close()

    def close(self) -> None:
        """Frees the buffers, ends reads, leaves the groups and the control plane, removes the sockets."""
        with ExitStack() as ending:  # The last first, and each whatever the others raise.
            ending.callback(self.zmq_ctx.term)
            ending.callback(self.directory.close)
            ending.callback(self.control.close)
            ending.callback(self.drop_groups)
            ending.callback(self.reading.close)
            ending.callback(self.buffers.free)
