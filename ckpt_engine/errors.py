"""Every error this package raises, in one tree.

* CkptEngineError
  - ConfigError              a bad argument, environment variable or setting (also a ValueError)
  - CheckpointError          something about a checkpoint in host memory or on disk
    · CheckpointFormatError    a file is not what it claims to be
    · CheckpointExistsError    the name is registered already
    · UnknownCheckpointError   nothing is registered or gathered under this name (also a KeyError)
    · HostMemoryError          the host cannot give, or pin, the memory (also a MemoryError)
  - DeviceError              the device, or its driver, refuses (also a RuntimeError)
  - PlanError                no valid update plan exists for these metas
  - ProtocolError            a message that this version cannot accept
  - CorruptionError          a tensor's bytes are not those that were registered
  - P2PError                 a read by P2P failed, or its owner refuses or ends the lease
    · P2PUnavailable           this process cannot read, or be read, by P2P
  - EngineRequestError       the engine refused, or could not be asked, to start receiving
  - UpdateError              an update ended without a commit; carries an `ErrorRecord`
    · UpdateTimeout            a deadline passed (also a TimeoutError)
    · PeerLost                 a process on the other side of a connection is gone
    · OutcomeUnknown           this rank could not learn how the update was decided
    · RestoreError             it failed, and so did the restore of what was there before
  - PublishError             `req_func` failed after the commit: the weights are in place

The embedded engine and the demo derive their own from these.

Source of the rules on what is raised where: docs/architecture.md, "Errors".
"""

from __future__ import annotations

import traceback as _traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

MAX_TEXT = 64 * 1024
"""Longest message or traceback, in characters, that travels between processes."""
MAX_NAME = 1024
"""Longest name of a tensor or a type, in characters, in an error that travels."""


class CkptEngineError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(CkptEngineError, ValueError):
    """A bad argument, environment variable or setting; the message names it and what it may be."""


class CheckpointError(CkptEngineError):
    """Something is wrong with a checkpoint, on disk or in host memory."""


class CheckpointFormatError(CheckpointError):
    """A file is truncated, contradicts itself, or holds what this version cannot read."""


class CheckpointExistsError(CheckpointError):
    """The name is registered already; unregister it first or choose another name."""


class UnknownCheckpointError(CheckpointError, KeyError):
    """Nothing is registered, or nothing was gathered, under this name."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class HostMemoryError(CheckpointError, MemoryError):
    """The host cannot give, or pin, the memory that is needed; nothing of it is held."""


class DeviceError(CkptEngineError, RuntimeError):
    """A call of the device's runtime failed; the message says which and why."""


class PlanError(CkptEngineError):
    """No valid update plan exists for these metas and this memory; the message says what is needed."""


class ProtocolError(CkptEngineError):
    """A message between processes is malformed, too large, or from another protocol version."""


class CorruptionError(CkptEngineError):
    """A tensor's bytes are not those that were registered; the message names it. `bucket`: in which it came,
    in an update."""

    def __init__(self, message: str, *, bucket: int | None = None) -> None:
        self.bucket = bucket
        super().__init__(message)


class P2PError(CkptEngineError):
    """A read by P2P failed, or its owner cannot be reached, refuses a lease, or has ended it."""


class P2PUnavailable(P2PError):
    """This process cannot read, or be read, by P2P; the message says what is missing."""


class EngineRequestError(CkptEngineError):
    """The engine could not be asked to receive, or one of its workers reported a failure."""


@dataclass(kw_only=True, frozen=True)
class ErrorRecord:
    """What went wrong, where: plain data that crosses process borders as JSON.

    `rank`, `host`, `device`: the parameter server on whose side it happened (None: unknown there).
    `stage`: begin, handshake, buckets, release, post_hook, finish, request or decide.
    `bucket`, `tensors`: the bucket's index and its tensors' names, where a bucket was at work; of thousands
    the first and the last ones, and how many were `left_out`.
    `elapsed`: seconds since the update began on that rank.
    """

    error_type: str
    message: str
    stage: str = ""
    rank: int | None = None
    host: str | None = None
    device: str | None = None
    bucket: int | None = None
    tensors: Sequence[str] = field(default_factory=tuple)
    elapsed: float | None = None
    traceback: str = ""
    left_out: int = 0

    def where(self) -> str:
        """One phrase: `rank 1 (host h, device CPU-h-1), stage buckets, bucket 3 (tensors a .. z)`."""
        parts: list[str] = []
        if self.rank is not None:
            inside = ", ".join(
                text
                for text in (
                    f"host {self.host}" if self.host else "",
                    f"device {self.device}" if self.device else "",
                )
                if text
            )
            parts.append(f"rank {self.rank}" + (f" ({inside})" if inside else ""))
        if self.stage:
            parts.append(f"stage {self.stage}")
        if self.bucket is not None:
            names = list(self.tensors)
            count = len(names) + self.left_out
            shown = ", ".join(names) if count <= 3 else f"{names[0]} .. {names[-1]}, {count} in all"
            parts.append(f"bucket {self.bucket}" + (f" (tensors {shown})" if names else ""))
        if self.elapsed is not None:
            parts.append(f"after {self.elapsed:.2f} s")
        return ", ".join(parts)

    def describe(self) -> str:
        """The whole story for a log: where, what, and the remote traceback."""
        where = self.where()
        text = (
            f"{where}: {self.error_type}: {self.message}" if where else f"{self.error_type}: {self.message}"
        )
        if self.traceback:
            text += "\n--- traceback where it happened ---\n" + self.traceback.rstrip()
        return text

    def travelling(self) -> ErrorRecord:
        """This record as it crosses process borders: bounded, and with what UTF-8 cannot say escaped."""
        names = list(self.tensors)
        # A bucket of thousands of small tensors: the ends are enough to find it.
        kept = names if len(names) <= 64 else [*names[:32], *names[-32:]]
        return replace(
            self,
            error_type=as_utf8(self.error_type)[:MAX_NAME],
            message=as_utf8(self.message)[:MAX_TEXT],
            traceback=as_utf8(self.traceback)[-MAX_TEXT:],
            tensors=[as_utf8(name)[:MAX_NAME] for name in kept],
            left_out=self.left_out + len(names) - len(kept),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tensors": list(self.tensors)}

    @classmethod
    def from_exception(cls, error: BaseException, **where: Any) -> ErrorRecord:  # noqa: ANN401 - the record's fields
        """Describes `error`; an `UpdateError`'s own record wins over `where`, which fills its gaps."""
        if isinstance(error, UpdateError):
            record = error.record
            gaps = {key: value for key, value in where.items() if not getattr(record, key)}
            if record.rank is not None:
                gaps.pop("rank", None)
            if record.bucket is not None:
                gaps.pop("bucket", None)
                gaps.pop("left_out", None)
            return replace(record, **gaps)
        text = "".join(_traceback.format_exception(type(error), error, error.__traceback__))
        return cls(
            error_type=type(error).__name__,
            message=str(error)[:MAX_TEXT],
            traceback=text[-MAX_TEXT:],
            **where,
        )


def as_utf8(text: str) -> str:
    """`text` with what UTF-8 cannot say escaped."""
    # Python's names of files in another encoding hold lone surrogates.
    return text.encode("utf-8", "backslashreplace").decode()


class UpdateError(CkptEngineError):
    """The update did not commit. `record` says where it failed first; every rank raises the same record.
    Only of a lost rank nobody knows how far it had come: there each tells its own stage, bucket and tensors.

    `touched`: whether this rank's worker may hold some of the new weights (it is then *incomplete*
    until a full update succeeds). None: this rank does not know. `restored`: the version that was put back
    into it (`on_failure="restore"`).
    """

    def __init__(self, record: ErrorRecord, *, touched: bool | None = None) -> None:
        self.record = record
        self.touched = touched
        self.restored: str | None = None
        super().__init__(record)

    def __str__(self) -> str:
        return self.describe()

    def describe(self, *, tracebacks: bool = True) -> str:
        """All that is known of it."""
        text = _described(self.record, tracebacks)
        return text if self.restored is None else f"{text}\n(version {self.restored!r} was put back)"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_update_error, (type(self), self.record, vars(self)))


def _described(record: ErrorRecord, tracebacks: bool) -> str:
    return (record if tracebacks else replace(record, traceback="")).describe()


def _rebuild_update_error(
    kind: type[UpdateError], record: ErrorRecord, attributes: dict[str, Any]
) -> UpdateError:
    error = kind(record)
    vars(error).update(attributes)
    return error


class UpdateTimeout(UpdateError, TimeoutError):
    """A deadline passed; the record says what was waited for."""


class PeerLost(UpdateError):
    """The process on the other side of a connection died or closed it."""


class OutcomeUnknown(UpdateError):
    """Rank 0 was lost after this rank's vote: the outcome is unknown, the worker counts as incomplete."""


class RestoreError(UpdateError):
    """An update failed, and so did the restore after it: the workers stay as the update left them. `record`
    says where the restore failed first, `update_record` where the update did."""

    def __init__(
        self, record: ErrorRecord, *, touched: bool | None = None, update_record: ErrorRecord | None = None
    ) -> None:
        super().__init__(record, touched=touched)
        self.update_record = update_record

    def describe(self, *, tracebacks: bool = True) -> str:
        text = f"what was there before could not be put back: {_described(self.record, tracebacks)}"
        if self.update_record is None:
            return text
        first = _described(self.update_record, tracebacks)
        return f"{text}\n--- the update itself had failed ---\n{first}"


class PublishError(CkptEngineError):
    """`req_func` failed after the commit. The new weights are in place on every rank (`committed`)."""

    def __init__(self, message: str, *, committed: bool = True) -> None:
        self.committed = committed
        super().__init__(message)


def clear_frames(error: BaseException | None) -> None:
    """Drops the locals of the frames that the error's traceback keeps: they hold views of the ring, whose
    memory would otherwise stay for as long as somebody keeps the error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        _traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
