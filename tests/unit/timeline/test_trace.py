"""Traces: what is recorded comes back from the file, on one clock, and a file that is none is refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from ckpt_engine.devices import CpuDevice
from ckpt_engine.errors import ConfigError, PublishError
from ckpt_engine.metadata import HostBufferMeta, RankMetas, TensorMeta
from ckpt_engine.planning.plan import UpdatePlan, make_plan
from ckpt_engine.settings import Settings
from ckpt_engine.timeline.recorder import NO_RECORDER, Recorder, TraceRecorder
from ckpt_engine.timeline.trace import (
    H2D,
    P2P,
    RELOAD,
    STAGES,
    About,
    RankTrace,
    Span,
    aligned,
    from_json,
    load,
    to_json,
)


def about(rank: int = 0, update: str = "c.00", clock: str = "here", met: float = 1000.0) -> About:
    return About(
        update=update,
        checkpoint="c",
        rank=rank,
        host="h",
        device=f"CPU-h-{rank}",
        device_type="cpu",
        clock=clock,
        met=met,
    )


def trace(rank: int = 0, clock: str = "here", met: float = 1000.0, update: str = "c.00") -> RankTrace:
    return RankTrace(
        about=about(rank, update, clock, met),
        spans=[
            Span(track=STAGES, name="begin", begin=met - 1, end=met + 1),
            Span(track=H2D, name="bucket 0", begin=met + 0.25, end=met + 0.5, bucket=0, nbytes=300),
        ],
        in_ring=[(met + 0.5, 1), (met + 1, 0)],
    )


def plan_of(*sizes: int) -> UpdatePlan:
    tensors, end = [], 0
    for number, nbytes in enumerate(sizes):
        tensors.append(
            TensorMeta(name=f"t{number}", dtype="uint8", shape=(nbytes,), offset=end, nbytes=nbytes)
        )
        end += nbytes
    held = HostBufferMeta(address=0, nbytes=end, tensors=tuple(tensors))
    metas = {0: RankMetas(rank=0, host="h", host_ip="", device_uuid="u", epoch="e", buffers=(held,))}
    return make_plan("c", metas, slot_nbytes=256, slot_count=2, budget=2**30)


def test_a_trace_comes_back_from_its_file() -> None:
    both = [trace(0), trace(3, clock="there", met=2000.5)]
    assert from_json(to_json(both)) == both


def test_chrome_and_perfetto_find_what_they_need() -> None:
    events = json.loads(to_json([trace(3)]))["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"rank 3 (h, CPU-h-3)"}
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert all({"pid", "tid", "ts", "dur"} <= event.keys() for event in events if event["ph"] == "X")


def test_traces_of_other_clocks_are_moved_by_the_instant_at_which_all_met() -> None:
    """The first of each host's ranks to know of the meeting counts: the others were only late."""
    traces = [
        trace(0, "here", 1000.0),
        trace(1, "here", 1000.25),
        trace(2, "there", 5000.5),
        trace(3, "there", 5000.0),
        RankTrace(about=about(4, clock="elsewhere", met=0.0), spans=[]),
    ]
    moved = aligned(traces)
    assert [one.about.met for one in moved] == [1000.0, 1000.25, 1000.5, 1000.0, 0.0]
    assert moved[:2] == traces[:2]
    assert moved[3].spans == traces[0].spans
    assert moved[3].in_ring == traces[0].in_ring


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents": []}',
        '{"traceEvents": [], "otherData": {"format": "another 1"}}',
        to_json([trace()]).replace('"rank": 0', '"number": 0'),
        to_json([trace()]).replace('"tid": 3', '"tid": 99'),
    ],
)
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"some\.json is no trace of an update"):
        from_json(text, "some.json")


def write(directory: Path, one: RankTrace, seconds: float) -> Path:
    file = directory / f"{one.about.update}.rank{one.about.rank}.trace.json"
    file.write_text(to_json([one]))
    os.utime(file, (seconds, seconds))
    return file


def test_a_directory_means_its_latest_update(tmp_path: Path) -> None:
    old = [write(tmp_path, trace(rank, update="a.1.0"), 100) for rank in range(2)]
    write(tmp_path, trace(1, update="a.1.1"), 101)
    write(tmp_path, trace(0, update="a.1.1"), 102)
    latest = load([tmp_path])
    assert [(one.about.update, one.about.rank) for one in latest] == [("a.1.1", 0), ("a.1.1", 1)]
    assert [one.about.update for one in load(old)] == ["a.1.0", "a.1.0"]
    with pytest.raises(ConfigError, match="traces of 2 updates"):
        load([old[0], tmp_path])


def test_no_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file there ends in \.trace\.json"):
        load([tmp_path])
    with pytest.raises(ConfigError, match="no file is named"):
        load([])


def recorded(directory: Path, name: str = "c") -> tuple[TraceRecorder, UpdatePlan]:
    device = CpuDevice(Settings(host_id_override="h"), 0)
    one = About(
        update="not-met", checkpoint=name, rank=0, host="h", device="CPU-h-0", device_type="cpu", clock="b"
    )
    return TraceRecorder(directory, one, device), plan_of(200, 300, 100)


def test_a_recorder_writes_the_whole_course(tmp_path: Path) -> None:
    recorder, plan = recorded(tmp_path / "made" / "here", "a/b c")
    with recorder.update():
        recorder.met("secret", 1)
        recorder.planned(plan)
        recorder.stage("buckets")
        for item in plan.buckets[:2]:
            with recorder.on_stream(H2D, item):
                pass
            recorder.delivered(item)
            recorder.announced(item)
        recorder.given_back(0)
        recorder.given_back(1)
        recorder.add(P2P, plan.buckets[2], 5.0, 6.0)
    (file,) = (tmp_path / "made" / "here").iterdir()
    assert "secret" not in file.read_text()
    assert file.name.startswith("a%2Fb%20c.")
    (one,) = load([file])
    assert (one.about.checkpoint, one.about.outcome, one.about.buckets) == ("a/b c", "committed", 3)
    assert (one.about.slot_count, one.about.nbytes, one.about.ranks) == (2, 600, 1)
    assert [span.name for span in one.of(STAGES)] == ["begin", "buckets"]
    assert [(span.bucket, span.nbytes) for span in one.of(H2D)] == [(0, 200), (1, 300)]
    first, second = one.of(RELOAD)
    assert (first.bucket, second.bucket) == (0, 1)
    assert second.begin >= first.end - 1e-6
    assert [round(span.seconds, 3) for span in one.of(P2P)] == [1.0]
    assert [count for _, count in one.in_ring] == [1, 2, 1, 0]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("first line\nsecond"), "RuntimeError: first line"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (PublishError("late"), "committed, but PublishError: late"),
    ],
)
def test_a_failed_update_is_traced_too(tmp_path: Path, error: BaseException, outcome: str) -> None:
    recorder, plan = recorded(tmp_path)
    with pytest.raises(type(error)), recorder.update():
        recorder.met("secret", 1)
        with recorder.on_host(H2D, plan.buckets[0]):
            raise error
    (one,) = load([tmp_path])
    assert one.about.outcome == outcome
    assert len(one.of(H2D)) == 1


def test_a_trace_that_cannot_be_written_fails_no_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    recorder, _ = recorded(blocked)
    caplog.set_level(logging.WARNING)
    with recorder.update():
        recorder.met("secret", 1)
    assert "the trace of the update of 'c' is lost" in caplog.text


def test_what_keeps_nothing_has_every_method_of_what_does() -> None:
    named = {name for name in vars(TraceRecorder) if not name.startswith("_")}
    assert named <= vars(Recorder).keys()
    plan = plan_of(10)
    with NO_RECORDER.update(), NO_RECORDER.on_host(H2D, plan.buckets[0]):
        NO_RECORDER.given_back(0)
