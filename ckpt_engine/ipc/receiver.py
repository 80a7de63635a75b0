"""The worker's side: `update_weights_from_ipc`, run inside the engine's process on its device.

Typical usage, in an engine's worker:

    status = serve_update(zmq.Context.instance(), handles, device_uuid, device_id,
                          run=model.load_weights, post_hook=process_weights)

The loop never waits without a deadline, and it ends when the parameter server dies (EOF on the lifeline).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import zmq

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import MappedRing, map_ring, synchronize_stream
from ckpt_engine.errors import (
    ConfigError,
    CorruptionError,
    ErrorRecord,
    PeerLost,
    ProtocolError,
    UpdateError,
    UpdateTimeout,
    clear_frames,
)
from ckpt_engine.ipc import messages
from ckpt_engine.ipc.connection import LEAVE_SECONDS, ServerConnection
from ckpt_engine.ipc.verification import NAMES_SHOWN, Loaded, Verification
from ckpt_engine.ipc.views import RingViews
from ckpt_engine.settings import load_settings

logger = logging.getLogger(__name__)

Run = Callable[[list[tuple[str, torch.Tensor]]], object]
"""Loads the tensors of one bucket, shapes as in the checkpoint. They are valid until it returns."""
Prepare = Callable[[Sequence[messages.TensorLayout]], object]
"""Looks at all tensors that will come, in their order, before the first byte does. What it raises ends the
update with no worker touched."""

_M = TypeVar("_M", bound=messages.ServerMessage)

DECISION_GRACE_SECONDS = 30.0
"""How much longer than the update's own deadline a worker waits to hear how it ended."""


@dataclass(kw_only=True, frozen=True, slots=True)
class WorkerReport:
    """A committed update, as one worker saw it. `nbytes`: bytes of the tensors; `seconds`: in the loop;
    `verified`: how many tensors were compared as they `arrived`, and as they were `loaded`; `not_compared`:
    the names of those that could not be as loaded, of an update that was verified in full."""

    checkpoint: str
    version: str
    buckets: int
    tensors: int
    nbytes: int
    seconds: float
    verified: Mapping[str, int] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()


def update_weights_from_ipc(
    zmq_ctx: zmq.Context[zmq.Socket[bytes]],
    zmq_handle: str,
    device_id: int | None,
    *,
    run: Run,
    prepare: Prepare | None = None,
    post_hook: Callable[[], object] | None = None,
    loaded: Loaded | None = None,
    device_uuid: str = "",
    time_limit: float | None = None,
) -> WorkerReport:
    """Receives one update from the parameter server behind `zmq_handle`.

    Args:
        zmq_ctx: the caller's context; one socket is opened on it and closed again.
        zmq_handle: an `ipc://` address from `req_func`'s socket paths.
        device_id: index of this process's own device, on which the ring is rebuilt; None on CPU.
        run: called once per bucket with `[(name, tensor), ...]`.
        prepare: called once with the layouts of all tensors, before the first bucket.
        post_hook: called once after the last bucket, when the ring has been released.
        loaded: what the engine then holds of a tensor, for updates that are verified in full.
        device_uuid: this device's key; checked by the parameter server when given.
        time_limit: seconds in which this call is to have returned or raised, whatever the parameter server
            allows; only the engine's own code may outlast them.

    Returns:
        What was received, once every rank has committed.

    Raises:
        UpdateError: the update ended without a commit, here or on any rank. `touched` says whether
            this engine may now hold part of the new weights.
    """
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit={time_limit}: must be a positive number of seconds")
    receiver = _Receiver(
        zmq_ctx, zmq_handle, device_id, run, prepare, post_hook, loaded, device_uuid, time_limit
    )
    return receiver.receive()


def serve_update(
    zmq_ctx: zmq.Context[zmq.Socket[bytes]],
    zmq_handles: Mapping[str, str] | Sequence[Sequence[str]],
    device_uuid: str,
    device_id: int | None,
    *,
    run: Run,
    prepare: Prepare | None = None,
    post_hook: Callable[[], object] | None = None,
    loaded: Loaded | None = None,
    time_limit: float | None = None,
) -> dict[str, Any]:
    """`update_weights_from_ipc` for adapters: finds this device's handle, and never raises.

    Some engines lose the order of their replies for good when a worker's method raises, so the
    outcome is a plain dict: `outcome` ("committed" or "failed"), `device`, `handle`, `version`, `error`,
    `traceback`, `touched`, `tensors`, `bytes`, `verified` (how many tensors were compared as they `arrived`,
    and as they were `loaded`), `not_compared` (up to NAMES_SHOWN names of those that could not be as loaded).
    A handle is made for one update of one device, so it tells whoever asked whether the answer is to this
    call, or late from an earlier one.

    Args:
        zmq_handles: `{device_uuid: handle}` or `[(device_uuid, handle), ...]` of all ranks.
    """
    handles: dict[str, str] = {}
    try:
        handles = _by_device(zmq_handles)
        if device_uuid not in handles:
            served = ", ".join(handles) or "none"
            error = ConfigError(f"no handle for device {device_uuid}; the parameter servers serve {served}")
            return refuse_update(zmq_ctx, zmq_handles, error, device_uuid)
        report = update_weights_from_ipc(
            zmq_ctx,
            handles[device_uuid],
            device_id,
            run=run,
            prepare=prepare,
            post_hook=post_hook,
            loaded=loaded,
            device_uuid=device_uuid,
            time_limit=time_limit,
        )
    except Exception as error:  # noqa: BLE001 - see the docstring: no exception may leave a worker
        return failed_status(error, device_uuid, handles.get(device_uuid))
    return {
        "outcome": "committed",
        "device": device_uuid,
        "handle": handles[device_uuid],
        "version": report.version,
        "error": None,
        "traceback": None,
        "touched": True,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "verified": report.verified,
        "not_compared": list(report.not_compared[:NAMES_SHOWN]),
    }


def refuse_update(
    zmq_ctx: zmq.Context[zmq.Socket[bytes]],
    zmq_handles: Mapping[str, str] | Sequence[Sequence[str]],
    error: Exception,
    device_uuid: str = "",
) -> dict[str, Any]:
    """For a worker that cannot take part, and may not know its device: tells any parameter server why.

    Else the update would wait for this worker in vain. Never raises.

    Returns:
        The worker's status, as of `serve_update`.
    """
    try:
        _report_refusal(zmq_ctx, list(_by_device(zmq_handles).values()), device_uuid, error)
    except Exception as second:  # noqa: BLE001 - no exception may leave a worker
        second.__cause__ = error
        error = second
    return failed_status(error, device_uuid, None)


def _by_device(zmq_handles: Mapping[str, str] | Sequence[Sequence[str]]) -> dict[str, str]:
    return dict(zmq_handles) if isinstance(zmq_handles, Mapping) else {u: h for u, h in zmq_handles}


def failed_status(error: BaseException, device_uuid: str, handle: str | None) -> dict[str, Any]:
    """The status of a worker whose update ended with `error`."""
    record = ErrorRecord.from_exception(error)
    return {
        "outcome": "failed",
        "device": device_uuid,
        "handle": handle,
        "version": None,
        "error": f"{record.error_type}: {record.message}",
        "traceback": record.traceback,
        "touched": getattr(error, "touched", False),
        "tensors": 0,
        "bytes": 0,
        "verified": {},
        "not_compared": [],
    }


class _Receiver:
    def __init__(
        self,
        zmq_ctx: zmq.Context[zmq.Socket[bytes]],
        handle: str,
        device_id: int | None,
        run: Run,
        prepare: Prepare | None,
        post_hook: Callable[[], object] | None,
        loaded: Loaded | None,
        device_uuid: str,
        time_limit: float | None,
    ) -> None:
        self._settings = load_settings()
        self._time_limit = time_limit
        self._leave_seconds = LEAVE_SECONDS if time_limit is None else min(LEAVE_SECONDS, time_limit / 4)
        end = math.inf if time_limit is None else time_limit - self._leave_seconds
        self._end = Deadline.after(end)
        self._connection = ServerConnection(zmq_ctx, handle)
        self._device_id = device_id
        self._run = run
        self._prepare = prepare
        self._post_hook = post_hook
        self._loaded = loaded
        self._verification: Verification | None = None
        self._begin: messages.Begin | None = None
        self._uuid = device_uuid
        self._ring: MappedRing | None = None
        self._views: RingViews | None = None
        self._stage = "handshake"
        self._bucket: int | None = None
        self._layout: messages.BucketLayout | None = None
        self._touched = False
        self._started = time.monotonic()

    def receive(self) -> WorkerReport:
        try:
            return self._receive()
        except Exception as error:
            self._find_bucket(error)
            # An Abort is the parameter server's own news: it needs no report of ours.
            record = ErrorRecord.from_exception(
                error,
                stage=self._stage,
                bucket=self._bucket,
                tensors=tuple(messages.names_of(self._layout)) if self._layout is not None else (),
                elapsed=time.monotonic() - self._started,
            )
            clear_frames(error)
            if not isinstance(error, _Aborted | PeerLost):
                self._leave(record)
            kind = type(error) if isinstance(error, UpdateError) else UpdateError
            raise kind(record, touched=self._touched) from error
        finally:
            try:
                self._release()
            except Exception:  # none is left after a success; the failure counts more than this
                logger.exception("the ring of a failed update could not be released")
            finally:
                self._connection.close()

    def _receive(self) -> WorkerReport:
        connection = self._connection
        connection.send(messages.Hello(messages.PROTOCOL_VERSION, self._uuid, os.getpid()))
        handshake = self._end.or_after(self._settings.handshake_timeout)
        begin = self._expect(messages.Begin, handshake, "the update's plan")
        deadline = self._end.or_after(begin.budget + DECISION_GRACE_SECONDS)
        messages.check_layout(begin)
        self._begin = begin
        self._ring = map_ring(begin.ring, connection.receive_descriptors(), self._device_id)
        self._views = RingViews(self._ring)
        if begin.verify:
            at_once = self._device_id is None
            self._verification = Verification(begin, self._ring, self._loaded, at_once=at_once)
        if self._prepare is not None:
            self._prepare([tensor for bucket in begin.buckets for tensor in bucket.tensors])
        connection.send(messages.Ready(self._ring.own_events()))
        self._stage = "buckets"
        for index, bucket in enumerate(begin.buckets):
            announced = self._expect(messages.BucketReady, deadline, f"bucket {index}")
            if announced.index != index:
                raise ProtocolError(f"bucket {announced.index} was announced in place of {index}")
            self._load(index, bucket)
            connection.send(messages.BucketDone(index))
            self._bucket = self._layout = None
        if self._verification is not None:
            self._verification.check_arrived()
        self._expect(messages.Finish, deadline, "the end of the buckets")
        self._stage = "release"
        # What the engine enqueued must have happened, and without an error of the device.
        self._ring.synchronize()
        self._release()
        connection.send(messages.Released())
        self._expect(messages.Freed, deadline, "the ring's memory to be freed")
        self._stage = "post_hook"
        if self._post_hook is not None:
            self._post_hook()
            synchronize_stream(self._device_id)
        if self._verification is not None:
            self._verification.check_loaded()
        self._stage = "finish"
        connection.send(messages.Finished())
        commit = self._expect(messages.Commit, deadline, "the decision of all ranks")
        connection.send(messages.Goodbye())
        return WorkerReport(
            checkpoint=begin.checkpoint,
            version=commit.version,
            buckets=len(begin.buckets),
            tensors=sum(len(bucket.tensors) for bucket in begin.buckets),
            nbytes=sum(tensor.nbytes for bucket in begin.buckets for tensor in bucket.tensors),
            seconds=time.monotonic() - self._started,
            verified={} if self._verification is None else self._verification.counts,
            not_compared=() if self._verification is None else self._verification.not_compared,
        )

    def _find_bucket(self, error: Exception) -> None:
        """What is found once all buckets are there is still of one of them."""
        if isinstance(error, CorruptionError) and error.bucket is not None and self._begin is not None:
            self._bucket, self._layout = error.bucket, self._begin.buckets[error.bucket]

    def _load(self, index: int, bucket: messages.BucketLayout) -> None:
        assert self._ring is not None
        assert self._views is not None
        self._bucket, self._layout = index, bucket
        if self._verification is not None:
            self._verification.bucket(index)
        tensors = self._views.tensors_of(bucket)
        self._touched = True
        self._run(tensors)
        self._ring.mark_given_back(index)

    def _expect(self, kind: type[_M], deadline: Deadline, waiting_for: str) -> _M:
        while True:
            # A wait that is none would not notice. But who has finished takes a decision that is there.
            if self._end.passed and kind is not messages.Commit:
                raise self._too_late(waiting_for)
            # A parameter server that is there says so every second.
            silence = deadline.or_after(self._settings.stall_timeout)
            try:
                message = self._connection.receive(silence, waiting_for)
            except UpdateTimeout:
                if self._end.passed:
                    raise self._too_late(waiting_for) from None
                raise
            if not isinstance(message, messages.StillHere):
                break
            if self._ring is not None:
                # Of a reload that failed on the device, nobody else would ever hear.
                self._ring.check()
        if isinstance(message, messages.Abort):
            # Before the goodbye, on which the parameter server frees the ring.
            self._release()
            with contextlib.suppress(zmq.ZMQError):
                self._connection.send(messages.Goodbye())
            raise _Aborted(ErrorRecord(error_type="UpdateAborted", message=message.reason))
        if not isinstance(message, kind):
            raise ProtocolError(f"got {type(message).__name__} while waiting for {waiting_for}")
        return message

    def _too_late(self, waiting_for: str) -> UpdateTimeout:
        message = (
            f"the engine's call has a limit of {self._time_limit:g} s, which came while this worker waited "
            f"for {waiting_for}: give the update more time"
        )
        return UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def _release(self) -> None:
        if self._views is not None:
            self._views.close()
        if self._verification is not None:
            self._verification.let_go()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _leave(self, record: ErrorRecord) -> None:
        """Reports the failure, and stays until it has been read."""
        failure = messages.Failure.from_record(record, device_uuid=self._uuid, touched=self._touched)
        self._connection.send(failure)
        deadline = Deadline.after(self._leave_seconds)
        with contextlib.suppress(UpdateError, ProtocolError):
            while not isinstance(self._connection.receive(deadline, "the abort"), messages.Abort):
                pass


class _Aborted(UpdateError):
    """The parameter server said that the update has ended."""


def _report_refusal(
    zmq_ctx: zmq.Context[zmq.Socket[bytes]], handles: Sequence[str], device_uuid: str, error: Exception
) -> None:
    record = ErrorRecord.from_exception(error, stage="handshake", device=device_uuid)
    for handle in handles:
        try:
            connection = ServerConnection(zmq_ctx, handle)
        except (UpdateError, ConfigError):
            continue
        try:
            connection.send(messages.Failure.from_record(record, device_uuid=device_uuid, touched=False))
            with contextlib.suppress(UpdateError, ProtocolError):
                connection.receive(Deadline.after(LEAVE_SECONDS), "the abort")
            return
        finally:
            connection.close()
