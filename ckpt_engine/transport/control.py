"""The control plane: one TCPStore, on which ranks meet, exchange what they know, and decide.

Ranks act in *rounds* (a gather or an update). A round's keys, under `r{n}/`:

    x/{rank}   what a rank brings            all      all of it, merged by rank 0 (or: aborted)
    votes      how many ranks are finished   verdict  the one write that decides (compare-and-set)
    seen       how many ranks know it

The store's own clients serialise their calls, so a watcher thread waits for the verdict on a clone;
it ends by itself, because every round that is watched is decided.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import (
    MAX_TEXT,
    ConfigError,
    ErrorRecord,
    OutcomeUnknown,
    ProtocolError,
    UpdateError,
    UpdateTimeout,
)

logger = logging.getLogger(__name__)

CHUNK_NBYTES = 4 * 1024 * 1024
"""The store refuses values over 8 MiB."""
EXIT_SECONDS = 10.0
"""How long rank 0, which serves the store, waits at its end for the others to have read the verdict."""


@dataclass(kw_only=True, frozen=True)
class Verdict:
    """How a round ended: `record` is None when it committed."""

    version: str | None = None
    record: ErrorRecord | None = None

    @property
    def committed(self) -> bool:
        return self.record is None

    def to_json(self) -> str:
        return json.dumps({"version": self.version, "record": self.record.to_dict() if self.record else None})

    @classmethod
    def from_json(cls, text: bytes) -> Verdict:
        fields = json.loads(text)
        record = fields["record"]
        return cls(version=fields["version"], record=ErrorRecord(**record) if record else None)


class Control:
    """This rank's place on the store. Rank 0 serves it."""

    def __init__(
        self, *, rank: int, world_size: int, master_addr: str, store_port: int, deadline: Deadline
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._round = 0
        self._last: Round | None = None
        self.past: list[Round] = []  # rounds whose values are still on the store
        timeout = timedelta(seconds=max(1.0, deadline.remaining))
        try:
            if rank == 0:
                # Bound to the address that the others use, not to every interface of the host.
                listener = socket.create_server((master_addr, store_port), backlog=1024)
                self.port: int = listener.getsockname()[1]
                self.store = TCPStore(
                    master_addr,
                    self.port,
                    world_size,
                    is_master=True,
                    timeout=timeout,
                    wait_for_workers=False,
                    master_listen_fd=listener.detach(),
                )
            else:
                self.port = store_port
                self.store = TCPStore(
                    master_addr, store_port, world_size, timeout=timeout, wait_for_workers=False
                )
        except (OSError, dist.DistError) as error:
            raise ConfigError(
                f"rank {rank} cannot {'serve' if rank == 0 else 'reach'} the control store at "
                f"{master_addr}:{store_port}: {error}. It is MASTER_ADDR and MASTER_PORT + 1 unless "
                "master_addr and master_port are given"
            ) from error
        self._watch_store: Store = self.store.clone()  # type: ignore[attr-defined] # not in torch's stubs

    def open_round(self) -> Round:
        """The next round. Ranks count alike: the n-th call of each rank is the same call.

        A rank that comes late to a round that was given up finds its verdict there, and raises it.
        """
        self._round += 1
        if self._last is not None:
            self._last.join_watcher()
            if self.rank == 0:
                self.past.append(self._last)
        self._last = Round(self, self._round, self.store, self._watch_store)
        return self._last

    def close(self) -> None:
        """Rank 0 keeps the store up until all ranks have left the last round, or a deadline."""
        last, self._last = self._last, None
        if last is None:
            return
        last.join_watcher()
        if self.rank == 0 and self.world_size > 1:
            deadline = Deadline.after(EXIT_SECONDS)
            with contextlib.suppress(dist.DistError):
                while self.store.add(f"{last.prefix}seen", 0) < self.world_size and not deadline.passed:
                    time.sleep(0.005)


class Round:
    """One meeting of all ranks."""

    def __init__(self, control: Control, number: int, store: Store, watch_store: Store) -> None:
        self.number = number
        self.prefix = f"r{number}/"
        self._control = control
        self._store = store
        self._watch_store = watch_store
        self._watcher: threading.Thread | None = None
        self._verdict: Verdict | None = None
        self._lost: str | None = None
        self._wake_read = -1
        self._wake_write = -1

    # Meeting

    def exchange(self, purpose: str, payload: bytes, deadline: Deadline) -> list[bytes]:
        """What every rank brought, by rank.

        Args:
            purpose: what this rank is doing; all ranks must be doing the same.
            payload: any bytes.

        Raises:
            UpdateTimeout: ranks are missing at the deadline (they are named).
            UpdateError: a rank aborted the round, or ranks disagree about the purpose.
        """
        mine = json.dumps(purpose).encode() + b"\n" + payload
        self._put(f"x/{self._control.rank}", zlib.compress(mine, 1))
        if self._control.rank == 0:
            self._merge(deadline)
        self._wait_for_all(deadline)
        blobs = _unpack(zlib.decompress(self._take("all")))
        purposes = [json.loads(blob.split(b"\n", 1)[0]) for blob in blobs]
        for rank, other in enumerate(purposes):
            if other != purpose:
                raise ProtocolError(
                    f"ranks are not doing the same: rank {self._control.rank} does {purpose}, "
                    f"rank {rank} does {other}"
                )
        return [blob.split(b"\n", 1)[1] for blob in blobs]

    def _merge(self, deadline: Deadline) -> None:
        missing = list(range(self._control.world_size))
        pause = 0.0005
        while missing:
            missing = [rank for rank in missing if not self._store.check([f"{self.prefix}x/{rank}"])]
            if self._store.check([f"{self.prefix}verdict"]):
                return
            if missing and deadline.passed:
                raise self._timeout(f"ranks {missing} did not arrive")
            if missing:
                time.sleep(pause)
                pause = min(0.02, pause * 2)
        # Every rank has come this far, so none still reads the rounds before.
        for past in self._control.past:
            past.forget()
        self._control.past.clear()
        blobs = [zlib.decompress(self._take(f"x/{rank}")) for rank in range(self._control.world_size)]
        self._put("all", zlib.compress(_pack(blobs), 1))

    def _wait_for_all(self, deadline: Deadline) -> None:
        if self._store.check([f"{self.prefix}verdict"]):
            self._raise_verdict()
        with contextlib.suppress(dist.DistStoreError):
            self._store.wait([f"{self.prefix}all"], timedelta(seconds=max(0.001, deadline.remaining)))
        if self._store.check([f"{self.prefix}verdict"]):
            self._raise_verdict()
        if not self._store.check([f"{self.prefix}all"]):
            absent = [
                rank
                for rank in range(self._control.world_size)
                if not self._store.check([f"{self.prefix}x/{rank}"])
            ]
            # Whose deadline passes first decides for all, and it need not be rank 0's.
            raise self._timeout(
                f"ranks {absent} did not arrive" if absent else "rank 0 did not say what all ranks brought"
            )

    def _timeout(self, message: str) -> UpdateTimeout:
        return UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message, stage="begin"))

    # Deciding

    def watch(self, seconds: float) -> int:
        """Starts watching for the verdict; returns a descriptor that is readable once it is known."""
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watcher = threading.Thread(
            target=self._watch, args=(seconds,), name=f"ckpt-engine-round-{self.number}", daemon=True
        )
        self._watcher.start()
        return self._wake_read

    def _watch(self, seconds: float) -> None:
        key = f"{self.prefix}verdict"
        try:
            self._watch_store.wait([key], timedelta(seconds=seconds))
            self._verdict = Verdict.from_json(self._watch_store.get(key))
        except (dist.DistError, RuntimeError) as error:
            self._lost = str(error).splitlines()[0]
        os.write(self._wake_write, b"v")

    def peek(self) -> Verdict | None:
        """The verdict, if the watcher has seen it.

        Raises:
            OutcomeUnknown: the watcher lost the store.
        """
        if self._lost is not None and self._verdict is None:
            raise _unknown(f"the control store cannot be reached: {self._lost}")
        return self._verdict

    def vote(self, version: str) -> None:
        """This rank is finished; the last one decides."""
        if self._store.add(f"{self.prefix}votes", 1) == self._control.world_size:
            self._decide(Verdict(version=version))

    def abort(self, record: ErrorRecord) -> Verdict:
        """Decides against, unless it is decided already; returns what was decided.

        Raises:
            OutcomeUnknown: the store cannot be reached.
        """
        verdict = self._decide(Verdict(record=_bounded(record)))
        with contextlib.suppress(dist.DistError, RuntimeError):
            # Those who wait for the meeting find the verdict.
            self._store.compare_set(f"{self.prefix}all", "", "0")
        return verdict

    def _decide(self, verdict: Verdict) -> Verdict:
        try:
            decided = self._store.compare_set(f"{self.prefix}verdict", "", verdict.to_json())
        except (dist.DistError, RuntimeError) as error:
            raise _unknown(f"the control store cannot be reached: {str(error).splitlines()[0]}") from error
        return Verdict.from_json(decided)

    def _raise_verdict(self) -> None:
        verdict = Verdict.from_json(self._store.get(f"{self.prefix}verdict"))
        if verdict.record is not None:
            raise error_of(verdict.record)

    def leave(self) -> None:
        """Lets rank 0 know that this rank has learnt all it needs of this round."""
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.add(f"{self.prefix}seen", 1)

    # Ending

    def join_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.join(EXIT_SECONDS)
            # One that still waits will write to its descriptor: by then it may be somebody else's.
            if not self._watcher.is_alive():
                os.close(self._wake_read)
                os.close(self._wake_write)
            self._watcher = None

    def forget(self) -> None:
        """Removes what ranks brought (the verdict stays: a late rank must find it). For rank 0."""
        for rank in range(self._control.world_size):
            self._delete(f"x/{rank}")
        self._delete("all")

    # Values of any size

    def _put(self, name: str, value: bytes) -> None:
        chunks = [value[start : start + CHUNK_NBYTES] for start in range(0, len(value), CHUNK_NBYTES)]
        for number, chunk in enumerate(chunks):
            self._store.set(f"{self.prefix}{name}#{number}", chunk)  # type: ignore[arg-type]  # bytes are fine
        # Not set(): an abort may have come first.
        self._store.compare_set(f"{self.prefix}{name}", "", str(len(chunks)))

    def _take(self, name: str) -> bytes:
        count = int(self._store.get(f"{self.prefix}{name}"))
        return b"".join(self._store.get(f"{self.prefix}{name}#{number}") for number in range(count))

    def _delete(self, name: str) -> None:
        if self._store.check([f"{self.prefix}{name}"]):
            # The name itself stays: nobody may wait in vain for it.
            for number in range(int(self._store.get(f"{self.prefix}{name}"))):
                self._store.delete_key(f"{self.prefix}{name}#{number}")


def error_of(record: ErrorRecord, touched: bool | None = None) -> UpdateError:
    """The exception that stands for a record."""
    kinds: dict[str, type[UpdateError]] = {kind.__name__: kind for kind in UpdateError.__subclasses__()}
    return kinds.get(record.error_type, UpdateError)(record, touched=touched)


def _bounded(record: ErrorRecord) -> ErrorRecord:
    """The store refuses values over 8 MiB by closing the connection, and then nothing can be decided."""
    names = [name[:1024] for name in record.tensors]
    return replace(
        record,
        message=record.message[:MAX_TEXT],
        traceback=record.traceback[-MAX_TEXT:],
        # As in a worker's Failure: the ends of a bucket are enough to find it.
        tensors=names if len(names) <= 64 else [*names[:32], *names[-32:]],
    )


def _unknown(message: str) -> OutcomeUnknown:
    return OutcomeUnknown(ErrorRecord(error_type="OutcomeUnknown", message=message, stage="decide"))


def _pack(blobs: Sequence[bytes]) -> bytes:
    header = json.dumps([len(blob) for blob in blobs]).encode()
    return header + b"\n" + b"".join(blobs)


def _unpack(data: bytes) -> list[bytes]:
    header, _, body = data.partition(b"\n")
    blobs, start = [], 0
    for nbytes in json.loads(header):
        blobs.append(body[start : start + nbytes])
        start += nbytes
    return blobs
