"""When a device's streams came to a point, on the host's clock: for traces only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ckpt_engine.devices.base import Device
from ckpt_engine.devices.npu import load as load_npu

Instant = Callable[[], float | None]
"""When something was, in seconds of `time.monotonic()`; None if it has not been yet."""


class HostClock:
    """Where everything is done when it returns."""

    def mark(self) -> Instant:
        now = time.monotonic()
        return lambda: now


class StreamClock:
    """Timed events of a device with streams."""

    def __init__(self, device: Device) -> None:
        self._event: Any = load_npu().Event if device.type == "npu" else torch.cuda.Event
        with device.use_copy_stream():
            self._begin = self._event(enable_timing=True)
            self._begin.record()
            self._begin.synchronize()
        self._time = time.monotonic()

    def mark(self) -> Instant:
        """Marks this point of the current stream; to be asked once that was synchronised."""
        event = self._event(enable_timing=True)
        event.record()
        return lambda: self._time + self._begin.elapsed_time(event) / 1e3 if event.query() else None


Clock = HostClock | StreamClock


def stream_clock(device: Device) -> Clock:
    """The clock of the device's streams."""
    return HostClock() if device.type == "cpu" else StreamClock(device)
