"""One rank's course of one update, and its file: Chrome's trace format, which Perfetto opens, too.

Times are seconds since the epoch. Hosts may disagree about those, so each trace says which clock it is by,
and when its rank knew that all had met: `aligned` moves the traces of other clocks onto the first one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_engine.errors import ConfigError

FORMAT = "ckpt-engine update 1"
SUFFIX = ".trace.json"
COMMITTED = "committed"

STAGES = "stages"
SLOT_WAIT = "slot wait"
SOURCE_WAIT = "source wait"
H2D = "H2D"
P2P = "P2P"
COPY = "copy"
BROADCAST = "broadcast"
RELOAD = "reload"
TRACKS = (STAGES, SLOT_WAIT, SOURCE_WAIT, H2D, P2P, COPY, BROADCAST, RELOAD)
"""In the order in which they are shown. `copy`: from another rank's ring on the same host."""
MOVES = (H2D, P2P, COPY, BROADCAST, RELOAD)
"""The tracks whose spans move bytes."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Span:
    """Something that took time. `bucket` is -1, and `nbytes` 0, where it is not about a bucket."""

    track: str
    name: str
    begin: float
    end: float
    bucket: int = -1
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(kw_only=True, frozen=True, slots=True)
class About:
    """Whose trace it is. `clock`: alike where traces have the same clock. `met`: when this rank knew that all
    had met, 0 if it never did. `outcome`: "committed", or what
    went wrong. The sizes are 0 where the update did not come to a plan."""

    update: str
    checkpoint: str
    rank: int
    host: str
    device: str
    device_type: str
    clock: str
    met: float = 0.0
    ranks: int = 0
    buckets: int = 0
    nbytes: int = 0
    slot_count: int = 0
    slot_nbytes: int = 0
    ring_nbytes: int = 0
    staging_nbytes: int = 0
    outcome: str = ""


@dataclass(kw_only=True, frozen=True, slots=True)
class RankTrace:
    """`in_ring`: (time, buckets that are in the ring from then on)."""

    about: About
    spans: Sequence[Span] = field(default_factory=tuple)
    in_ring: Sequence[tuple[float, int]] = field(default_factory=tuple)

    def of(self, track: str) -> list[Span]:
        return [span for span in self.spans if span.track == track]

    @property
    def begin(self) -> float:
        return min((span.begin for span in self.spans), default=0.0)

    @property
    def end(self) -> float:
        return max((span.end for span in self.spans), default=0.0)


def aligned(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """The traces of one update, on the clock of the first.

    All ranks meet at one instant, and the first of a host's to know it knew it a message's way later: that is
    as far as two hosts' traces may still be apart.
    """
    met: dict[str, float] = {}
    for trace in traces:
        about = trace.about
        if about.met:
            met[about.clock] = min(about.met, met.get(about.clock, about.met))
    reference = next(iter(met.values()), 0.0)
    return [_moved(trace, reference - met.get(trace.about.clock, reference)) for trace in traces]


def _moved(trace: RankTrace, by: float) -> RankTrace:
    return RankTrace(
        about=replace(trace.about, met=trace.about.met + by if trace.about.met else 0.0),
        spans=[replace(span, begin=span.begin + by, end=span.end + by) for span in trace.spans],
        in_ring=[(time + by, count) for time, count in trace.in_ring],
    )


def to_json(traces: Iterable[RankTrace]) -> str:
    """Chrome's trace format: a process for each rank, a thread for each track, a counter of the ring."""
    events: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    for trace in traces:
        rank = trace.about.rank
        about.append(asdict(trace.about))
        name = f"rank {rank} ({trace.about.host}, {trace.about.device})"
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}})
        events.append({"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}})
        for number, track in enumerate(TRACKS):
            named = {"ph": "M", "pid": rank, "tid": number}
            events.append(named | {"name": "thread_name", "args": {"name": track}})
            events.append(named | {"name": "thread_sort_index", "args": {"sort_index": number}})
        events += (
            {
                "ph": "X",
                "pid": rank,
                "tid": TRACKS.index(span.track),
                "cat": span.track,
                "name": span.name,
                "ts": span.begin * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"bucket": span.bucket, "bytes": span.nbytes} if span.bucket >= 0 else {},
            }
            for span in trace.spans
        )
        events += (
            {
                "ph": "C",
                "pid": rank,
                "name": "buckets in the ring",
                "ts": time * 1e6,
                "args": {"buckets": count},
            }
            for time, count in trace.in_ring
        )
    return json.dumps(
        {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"format": FORMAT, "about": about}}
    )


def from_json(text: str | bytes, where: str = "") -> list[RankTrace]:
    """The inverse of `to_json`. `where` the text is from, for errors.

    Raises:
        ConfigError: not a trace of this version.
    """
    try:
        document = json.loads(text)
        if document["otherData"]["format"] != FORMAT:
            raise ValueError(f"its format is {document['otherData']['format']!r}, not {FORMAT!r}")
        spans: dict[int, list[Span]] = {}
        in_ring: dict[int, list[tuple[float, int]]] = {}
        for event in document["traceEvents"]:
            if event["ph"] == "X":
                spans.setdefault(event["pid"], []).append(_span(event))
            elif event["ph"] == "C":
                in_ring.setdefault(event["pid"], []).append((event["ts"] / 1e6, event["args"]["buckets"]))
        about = [About(**fields) for fields in document["otherData"]["about"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{where or 'this'} is no trace of an update: {type(error).__name__}: {error}"
        ) from None
    return [
        RankTrace(about=one, spans=spans.get(one.rank, []), in_ring=in_ring.get(one.rank, []))
        for one in about
    ]


def _span(event: dict[str, Any]) -> Span:
    begin = event["ts"] / 1e6
    return Span(
        track=TRACKS[event["tid"]],
        name=event["name"],
        begin=begin,
        end=begin + event["dur"] / 1e6,
        bucket=event["args"].get("bucket", -1),
        nbytes=event["args"].get("bytes", 0),
    )


def load(paths: Sequence[Path]) -> list[RankTrace]:
    """The traces of one update, by rank, on one clock; of a directory, those of its latest update.

    Raises:
        ConfigError: no trace is there, a file is none, or the files are of several updates.
    """
    files = [file for path in paths for file in (_latest(path) if path.is_dir() else [path])]
    traces = [trace for file in files for trace in from_json(file.read_bytes(), str(file))]
    updates = {trace.about.update for trace in traces}
    if len(updates) > 1:
        raise ConfigError(f"these are traces of {len(updates)} updates, of which one can be shown at a time")
    if not traces:
        raise ConfigError(f"there is no trace: {', '.join(map(str, files)) or 'no file is named'}")
    return aligned(sorted(traces, key=lambda trace: trace.about.rank))


def _latest(directory: Path) -> list[Path]:
    """The files of the update whose traces were written last."""
    files = sorted(directory.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"{directory}: no file there ends in {SUFFIX}")
    update = _update_of(files[-1])
    return [file for file in files if _update_of(file) == update]


def file_name(about: About) -> str:
    """`{update}.rank{rank}.trace.json`."""
    return f"{about.update}.rank{about.rank}{SUFFIX}"


def _update_of(file: Path) -> str:
    return file.name.removesuffix(SUFFIX).rpartition(".")[0]
