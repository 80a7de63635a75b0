"""What an update tells about its course while it runs. Where no trace is wanted, `Recorder` keeps nothing.

with recorder.on_host(SLOT_WAIT, item):
    ...
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from ckpt_engine.devices import Device
from ckpt_engine.devices.clocks import Clock, Instant, stream_clock
from ckpt_engine.errors import PublishError
from ckpt_engine.planning.plan import PlannedBucket, UpdatePlan
from ckpt_engine.timeline.trace import COMMITTED, RELOAD, STAGES, About, RankTrace, Span, file_name, to_json

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()


class Recorder:
    """Keeps nothing."""

    def stage(self, name: str) -> None:
        """The session's next stage begins, and ends the one before it."""

    def met(self, secret: str, ranks: int) -> None:
        """So many ranks have met. `secret`: the same on all, different in each update."""

    def planned(self, plan: UpdatePlan) -> None:
        """What is to be done."""

    def on_host(self, track: str, item: PlannedBucket) -> AbstractContextManager[None]:
        """What is done inside is done when it is left."""
        return _NOTHING

    def on_stream(self, track: str, item: PlannedBucket) -> AbstractContextManager[None]:
        """What is done inside is only enqueued on the device's current stream."""
        return _NOTHING

    def add(self, track: str, item: PlannedBucket, begin: float, end: float) -> None:
        """Something that took from `begin` to `end`, in seconds of `time.monotonic()`. From any thread."""

    def delivered(self, item: PlannedBucket) -> None:
        """The bucket is in the ring, or on its way there."""

    def announced(self, item: PlannedBucket) -> None:
        """The worker may begin with the bucket, once it is done with those before it."""

    def given_back(self, index: int) -> None:
        """The worker says that it has done, or on a device enqueued, the reloads up to bucket `index`."""

    def has_read(self, index: int) -> None:
        """The worker's device has done the reloads up to bucket `index`."""

    def update(self) -> AbstractContextManager[None]:
        """The whole update; an exception is its outcome."""
        return _NOTHING


NO_RECORDER = Recorder()


class TraceRecorder(Recorder):
    """Keeps all, and writes it into a file of `directory` at the end."""

    def __init__(self, directory: Path, about: About, device: Device) -> None:
        self._directory = directory
        self._about = about
        self._clock: Clock = stream_clock(device)
        self._epoch = time.time() - time.monotonic()
        self._spans: list[tuple[str, PlannedBucket, Instant, Instant]] = []
        self._stages: list[tuple[str, float]] = []
        self._in_ring: list[tuple[float, int]] = []
        self._delivered = self._given_back = -1
        self._announced: deque[tuple[PlannedBucket, float]] = deque()
        self._worker_free = 0.0

    def stage(self, name: str) -> None:
        self._stages.append((name, time.monotonic()))

    def met(self, secret: str, ranks: int) -> None:
        # Not the secret itself: whoever reads the file may not speak for a rank.
        mark = hashlib.sha256(secret.encode()).hexdigest()[:8]
        self._about = replace(
            self._about,
            update=f"{quote(self._about.checkpoint, safe='')[:100]}.{mark}",
            met=self._epoch + time.monotonic(),
            ranks=ranks,
        )

    def planned(self, plan: UpdatePlan) -> None:
        self._about = replace(
            self._about,
            buckets=len(plan.buckets),
            nbytes=plan.nbytes,
            slot_count=plan.ring.count,
            slot_nbytes=plan.ring.slot_nbytes,
            ring_nbytes=plan.ring.nbytes,
            staging_nbytes=plan.staging_nbytes,
        )

    @contextmanager
    def on_host(self, track: str, item: PlannedBucket) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(track, item, begin, time.monotonic())

    @contextmanager
    def on_stream(self, track: str, item: PlannedBucket) -> Iterator[None]:
        begin = self._clock.mark()
        yield
        self._spans.append((track, item, begin, self._clock.mark()))

    def add(self, track: str, item: PlannedBucket, begin: float, end: float) -> None:
        self._spans.append((track, item, lambda: begin, lambda: end))

    def delivered(self, item: PlannedBucket) -> None:
        self._delivered = item.index
        self._count()

    def announced(self, item: PlannedBucket) -> None:
        self._announced.append((item, time.monotonic()))

    def given_back(self, index: int) -> None:
        self._given_back = index
        self._count()
        if self._about.device_type == "cpu":
            self._reloaded(index)

    def has_read(self, index: int) -> None:
        self._reloaded(index)

    def _count(self) -> None:
        self._in_ring.append((self._epoch + time.monotonic(), self._delivered - self._given_back))

    def _reloaded(self, index: int) -> None:
        while self._announced and self._announced[0][0].index <= index:
            item, begin = self._announced.popleft()
            end = time.monotonic()
            self.add(RELOAD, item, max(begin, self._worker_free), end)
            self._worker_free = end

    @contextmanager
    def update(self) -> Iterator[None]:
        self.stage("begin")
        try:
            yield
        except BaseException as error:
            committed = "committed, but " if isinstance(error, PublishError) and error.committed else ""
            self._write(f"{committed}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            raise
        self._write(COMMITTED)

    def _write(self, outcome: str) -> None:
        trace = self._trace(outcome, time.monotonic())
        path = self._directory / file_name(trace.about)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path.write_text(to_json([trace]))
        except OSError as error:  # The update is over, and what became of it stays true.
            logger.warning("the trace of the update of %r is lost: %s", self._about.checkpoint, error)
        else:
            logger.info("rank %d: the trace of this update is in %s", self._about.rank, path)

    def _trace(self, outcome: str, now: float) -> RankTrace:
        ends = [begin for _, begin in self._stages[1:]] + [now]
        spans = [
            Span(track=STAGES, name=name, begin=self._epoch + begin, end=self._epoch + end)
            for (name, begin), end in zip(self._stages, ends, strict=True)
        ]
        for track, item, begin_of, end_of in self._spans:
            begin, end = begin_of(), end_of()
            if begin is None or end is None:
                continue  # aborted before the device came to it
            spans.append(
                Span(
                    track=track,
                    name=f"bucket {item.index}",
                    begin=self._epoch + begin,
                    end=self._epoch + max(begin, end),
                    bucket=item.index,
                    nbytes=item.nbytes,
                )
            )
        return RankTrace(
            about=replace(self._about, outcome=outcome),
            spans=sorted(spans, key=lambda span: span.begin),
            in_ring=self._in_ring,
        )
