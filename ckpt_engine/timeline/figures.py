"""What the traces of an update say in numbers: each stage's seconds, and what each kind of move achieved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ckpt_engine.timeline.trace import MOVES, SLOT_WAIT, SOURCE_WAIT, STAGES, TRACKS, RankTrace, Span


@dataclass(kw_only=True, frozen=True, slots=True)
class Stage:
    """Seconds of a stage: on the rank that took longest, which is named, and on the one that was fastest."""

    name: str
    seconds: float
    rank: int
    fastest: float


@dataclass(kw_only=True, frozen=True, slots=True)
class Move:
    """One kind of move on the rank that was longest at it. Rates are in GB/s, 10^9 bytes per second.

    `busy`: seconds in which it went on. `share`: of the seconds of the stage of buckets. `rate`: while it
    went on. `limit`: what there is to be had, `limit_is` where that is from.
    """

    track: str
    rank: int
    nbytes: int
    busy: float
    share: float
    rate: float
    limit: float
    limit_is: str

    @property
    def achieved(self) -> float:
        """`rate` as a share of `limit`."""
        return self.rate / self.limit if self.limit else 0.0


@dataclass(kw_only=True, frozen=True, slots=True)
class Figures:
    """`waits`: for each kind of wait the rank that waited longest, and its seconds."""

    update: str
    checkpoint: str
    outcome: str
    ranks: int
    traced_ranks: int
    nbytes: int
    buckets: int
    ring_nbytes: int
    staging_nbytes: int
    seconds: float
    rate: float
    stages: tuple[Stage, ...]
    moves: tuple[Move, ...]
    waits: dict[str, tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {
            "moves": [asdict(move) | {"achieved": move.achieved} for move in self.moves],
            "waits": {name: {"rank": rank, "seconds": value} for name, (rank, value) in self.waits.items()},
        }


def figures_of(traces: Sequence[RankTrace], limits: Mapping[str, float] | None = None) -> Figures:
    """Of one update's traces, on one clock. `limits`: track -> GB/s; where one is missing, the fastest bucket
    of the track is taken for what can be had."""
    about = next((trace.about for trace in traces if trace.about.buckets), traces[0].about)
    begin, end = min(trace.begin for trace in traces), max(trace.end for trace in traces)
    return Figures(
        update=about.update,
        checkpoint=about.checkpoint,
        outcome=about.outcome,
        ranks=about.ranks,
        traced_ranks=len(traces),
        nbytes=about.nbytes,
        buckets=about.buckets,
        ring_nbytes=about.ring_nbytes,
        staging_nbytes=about.staging_nbytes,
        seconds=end - begin,
        rate=_rate(about.nbytes, end - begin),
        stages=tuple(_stages(traces)),
        moves=tuple(
            move for track in MOVES if (move := _move(track, traces, (limits or {}).get(track))) is not None
        ),
        waits={
            track: max(
                ((trace.about.rank, _busy(trace.of(track))) for trace in traces), key=lambda wait: wait[1]
            )
            for track in (SLOT_WAIT, SOURCE_WAIT)
            if any(trace.of(track) for trace in traces)
        },
    )


def _stages(traces: Sequence[RankTrace]) -> list[Stage]:
    seconds: dict[str, dict[int, float]] = {}
    for trace in traces:
        for span in trace.of(STAGES):
            seconds.setdefault(span.name, {})[trace.about.rank] = span.seconds
    return [
        Stage(
            name=name,
            seconds=max(by_rank.values()),
            rank=max(by_rank, key=lambda rank: by_rank[rank]),
            fastest=min(by_rank.values()),
        )
        for name, by_rank in seconds.items()
    ]


def _move(track: str, traces: Sequence[RankTrace], limit: float | None) -> Move | None:
    moved = [(trace, spans) for trace in traces if (spans := [s for s in trace.of(track) if s.nbytes])]
    if not moved:
        return None
    trace, spans = max(moved, key=lambda one: _busy(one[1]))
    busy = _busy(spans)
    nbytes = sum(span.nbytes for span in spans)
    fastest = max(_rate(span.nbytes, span.seconds) for span in spans)
    whole = sum(span.seconds for span in trace.of(STAGES) if span.name == "buckets")
    return Move(
        track=track,
        rank=trace.about.rank,
        nbytes=nbytes,
        busy=busy,
        share=busy / whole if whole else 0.0,
        rate=_rate(nbytes, busy),
        limit=limit or fastest,
        limit_is="given" if limit else "the fastest bucket",
    )


def _busy(spans: Sequence[Span]) -> float:
    """Seconds that at least one of the spans covers."""
    busy, covered = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        busy += max(0.0, span.end - max(span.begin, covered))
        covered = max(covered, span.end)
    return busy


def _rate(nbytes: float, seconds: float) -> float:
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0


@dataclass(kw_only=True, frozen=True, slots=True)
class Row:
    """A line of the timeline: one track of one rank. Times are seconds from the update's begin."""

    rank: int
    track: str
    spans: tuple[Span, ...]


def rows_of(traces: Sequence[RankTrace], resolution: float) -> list[Row]:
    """Every track of every trace that holds anything. Spans that are shorter than `resolution` seconds, and
    closer to the one before, are drawn as one with it: an update may have thousands of buckets."""
    begin = min(trace.begin for trace in traces)
    return [
        Row(rank=trace.about.rank, track=track, spans=tuple(_merged(spans, begin, resolution)))
        for trace in traces
        for track in TRACKS
        if (spans := trace.of(track))
    ]


def _merged(spans: Sequence[Span], zero: float, resolution: float) -> list[Span]:
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.begin):
        begin, end = span.begin - zero, span.end - zero
        last = merged[-1] if merged else None
        if (
            last is not None
            and span.seconds < resolution
            and begin - last.end < resolution
            and span.track != STAGES
        ):
            first = last.name.partition(" to ")[0]
            merged[-1] = Span(
                track=span.track,
                name=f"{first} to {span.bucket}",
                begin=last.begin,
                end=max(last.end, end),
                bucket=last.bucket,
                nbytes=last.nbytes + span.nbytes,
            )
        else:
            merged.append(
                Span(
                    track=span.track,
                    name=span.name,
                    begin=begin,
                    end=end,
                    bucket=span.bucket,
                    nbytes=span.nbytes,
                )
            )
    return merged
