"""Traces of real updates: what must be true of them, whatever device they ran on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ckpt_engine.timeline.trace import (
    COMMITTED,
    H2D,
    MOVES,
    P2P,
    RELOAD,
    SLOT_WAIT,
    STAGES,
    SUFFIX,
    About,
    RankTrace,
    Span,
    aligned,
    from_json,
)

ENTERED = ["begin", "handshake", "buckets", "release", "post_hook", "decide", "publish", "end"]
ROUNDING_SECONDS = 2e-6
"""A file has microseconds since the epoch, as doubles."""
CLOCK_SECONDS = 0.005
"""By which a device's clock and its host's may differ."""


def made_up(rank: int, spans: Sequence[Span], **fields: Any) -> RankTrace:  # noqa: ANN401 - of `About`
    """A trace of nothing that has happened."""
    known: dict[str, Any] = {"update": "u.01", "checkpoint": "c", "clock": "here", "met": 10.0, "ranks": 2}
    known |= {"outcome": COMMITTED}
    return RankTrace(
        about=About(rank=rank, host="h", device=f"CPU-h-{rank}", device_type="cpu", **known | fields),
        spans=spans,
    )


def updates_in(directory: Path) -> list[list[RankTrace]]:
    """The traces of each update on which ranks had met, in the updates' order."""
    found: dict[str, list[RankTrace]] = {}
    for file in sorted(directory.glob(f"*{SUFFIX}")):
        for trace in from_json(file.read_bytes()):
            if trace.about.met:
                found.setdefault(trace.about.update, []).append(trace)
    by_rank = [aligned(sorted(traces, key=lambda trace: trace.about.rank)) for traces in found.values()]
    return sorted(by_rank, key=lambda traces: traces[0].about.met)


def check_committed(traces: list[RankTrace]) -> None:
    """Of one update, in which every rank took part with a worker."""
    about = traces[0].about
    assert [trace.about.rank for trace in traces] == list(range(about.ranks))
    assert {trace.about.outcome for trace in traces} == {COMMITTED}
    everything = [span for trace in traces for span in trace.spans]
    # Every bucket comes once from its owner's host memory.
    assert Counter(span.bucket for span in everything if span.track == H2D) == dict.fromkeys(
        range(about.buckets), 1
    )
    for trace in traces:
        stages = trace.of(STAGES)
        assert [stage.name for stage in stages] == ENTERED
        assert all(abs(one.end - other.begin) < ROUNDING_SECONDS for one, other in pairwise(stages))
        handshake, moving = stages[1:3]
        for span in trace.spans:
            assert span.begin <= span.end
            if span.track in (*MOVES, SLOT_WAIT):
                # What is read ahead by P2P is read while the worker comes.
                begin = handshake.begin if span.track == P2P else moving.begin
                assert begin - CLOCK_SECONDS <= span.begin
                assert span.end <= moving.end + CLOCK_SECONDS
        # Reloads: each bucket once, one after the other, none before its bytes left the owner.
        reloads = trace.of(RELOAD)
        assert [span.bucket for span in reloads] == list(range(about.buckets))
        assert all(one.end <= other.begin + ROUNDING_SECONDS for one, other in pairwise(reloads))
        staged = {span.bucket: span.end for span in everything if span.track == H2D}
        assert all(staged[span.bucket] <= span.begin + CLOCK_SECONDS for span in reloads)
        # Credits: never more buckets than slots, and in the end none.
        counts = [count for _, count in trace.in_ring]
        assert max(counts) <= about.slot_count
        assert counts[-1] == 0
