"""Updates through real ranks, workers, sockets and files, in worlds of 1, 2 and 4 ranks and on 2 hosts."""

from __future__ import annotations

import os

import pytest

from ckpt_engine.timeline.trace import COMMITTED
from tests.integration.conftest import World
from tests.support.traces import check_committed, updates_in

THREADS_BETWEEN_UPDATES = (
    "MainThread",
    "ckpt-engine-control",
    "ckpt-engine-control-server",
    "ckpt-engine-leases",
)
AN_ERROR_IS_PROMPT_SECONDS = 20.0
"""Far below the update's timeout (60 s) and every deadline; far above what a loaded machine needs."""


def weights(world: World, scenario: str) -> list[dict[str, str]]:
    return [entry["worker"]["digests"] for entry in world.results(scenario)]


def test_every_worker_holds_the_files_bits(world: World) -> None:
    for entry in world.results("first"):
        assert entry["error"] is None
        assert entry["buckets"] > 3, "the checkpoint must not fit the ring at once"
        assert entry["worker"]["digests"] == world.first


def test_updates_follow_one_another_with_changed_weights(world: World) -> None:
    assert weights(world, "second") == [world.second] * world.size
    assert weights(world, "back") == [world.first] * world.size
    assert world.first != world.second


def test_a_slow_reload_is_not_overtaken(world: World) -> None:
    """On a device with streams the host runs ahead: the events alone keep a slot until it was read."""
    assert weights(world, "slow") == [world.second] * world.size


def test_a_worker_may_write_into_what_it_was_given(world: World) -> None:
    """Other ranks may still need the same bytes from the same memory."""
    assert weights(world, "writes") == [world.first] * world.size


def test_traces_tell_the_course_of_each_update(world: World) -> None:
    updates = updates_in(world.trace_dir)
    committed = [traces for traces in updates if traces[0].about.outcome == COMMITTED]
    whole = [traces for traces in committed if len(traces) == world.size]
    assert len(whole) >= 3
    for traces in whole:
        check_committed(traces)
    first = world.results("first")[0]
    assert whole[0][0].about.buckets == first["buckets"]
    failed = [trace.about.outcome for traces in updates for trace in traces if traces not in committed]
    assert any("injected in" in outcome for outcome in failed)


def test_versions_grow_and_are_the_same_on_every_rank_and_worker(world: World) -> None:
    seen = []
    for scenario in ("first", "second", "back"):
        versions = {entry["version"] for entry in world.results(scenario)}
        versions |= {entry["worker"]["status"]["version"] for entry in world.results(scenario)}
        assert len(versions) == 1
        seen.append(int(versions.pop()))
    assert seen == sorted(set(seen))


@pytest.mark.parametrize(
    ("scenario", "stage"),
    [
        ("raise in first bucket", "buckets"),
        ("raise in middle bucket", "buckets"),
        ("raise in last bucket", "buckets"),
        ("raise in post_hook", "post_hook"),
        ("missing handle", "handshake"),
    ],
)
def test_a_workers_error_reaches_every_rank(world: World, scenario: str, stage: str) -> None:
    entries = world.results(scenario)
    first = entries[0]
    for entry in entries:
        assert entry["error"] == "UpdateError"
        assert entry["record"] == first["record"], "every rank must report the same cause"
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS
        # A rank that learns of the abort while it meets the others does not ask its engine at all.
        if entry["asked"]:
            assert entry["worker"]["status"]["outcome"] == "failed", "every worker must have left its loop"
    assert any(entry["asked"] for entry in entries)
    assert first["record"]["stage"] == stage
    if stage != "handshake":
        assert first["record"]["rank"] == world.size - 1
        assert "injected in" in first["message"]
        assert "tests/support/worker.py" in first["record"]["traceback"]
    else:
        assert "CPU-nowhere-0" in first["message"]
    if stage == "buckets":
        expected = {"first": 0, "middle": 2, "last": world.results("first")[0]["buckets"] - 1}
        assert first["record"]["bucket"] == expected[scenario.split()[2]]
        assert set(first["record"]["tensors"]) <= world.second.keys()
        assert first["record"]["tensors"]


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("req_func raises", "ValueError: req_func gave up"),
        ("engine refuses", "EngineRequestError"),
        ("engine answers 500", "the engine is unwell"),
    ],
)
def test_a_failed_request_reaches_every_rank(world: World, scenario: str, text: str) -> None:
    entries = world.results(scenario)
    for entry in entries:
        assert entry["error"] == "UpdateError"
        assert entry["record"] == entries[0]["record"]
        assert entry["record"]["stage"] == "request"
        assert entry["record"]["rank"] == world.size - 1
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS
        assert text in entry["message"]


@pytest.mark.parametrize(
    ("scenario", "second"),
    [
        ("after raise in first bucket", False),
        ("after raise in middle bucket", True),
        ("after raise in last bucket", False),
        ("after raise in post_hook", True),
        ("after missing handle", True),
        ("after req_func raises", False),
        ("after engine refuses", True),
        ("after engine answers 500", False),
        ("after mistake of one", True),
        ("after skipped by one", False),
    ],
)
def test_the_next_update_works(world: World, scenario: str, second: bool) -> None:
    assert [entry["error"] for entry in world.results(scenario)] == [None] * world.size
    assert weights(world, scenario) == [world.second if second else world.first] * world.size


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("update before gather", "neither registered nor gathered"),
        ("registered, not gathered", "call gather_metas first"),
        ("gather unknown", "'nobody'"),
        ("unregistered", "neither registered nor gathered"),
        ("not gathered again", "call gather_metas first"),
    ],
)
def test_a_callers_mistake_is_named(world: World, scenario: str, text: str) -> None:
    for entry in world.results(scenario):
        assert entry["error"] == "UnknownCheckpointError"
        assert text in entry["message"]
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS


def test_one_ranks_own_mistake_reaches_the_others(world: World) -> None:
    *others, mistaken = world.results("mistake of one")
    assert mistaken["error"] == "ConfigError"
    for entry in others:
        assert entry["error"] == "UpdateError"
        assert entry["record"]["rank"] == world.size - 1
        assert "ranks=[99]" in entry["message"]
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS


def test_a_call_that_one_rank_leaves_out_names_it_and_is_no_harm_later(world: World) -> None:
    for rank in world.ranks[:-1]:
        assert rank["skipped by one"]["error"] == "UpdateTimeout"
        assert f"ranks [{world.size - 1}] did not arrive" in rank["skipped by one"]["message"]
    assert [entry["error"] for entry in world.results("after skipped by one")] == [None] * world.size


@pytest.mark.parametrize("kind", ["missing", "truncated", "lying"])
def test_a_broken_file_on_one_rank_is_known_to_all(world: World, kind: str) -> None:
    *others, broken = world.results(f"register {kind}")
    assert broken["error"] in ("CheckpointError", "CheckpointFormatError")
    assert f"{kind}.safetensors" in broken["message"]
    assert [entry["error"] for entry in others] == [None] * len(others)
    for entry in world.results(f"gather {kind}"):
        assert entry["error"] == "UpdateError"
        assert entry["record"]["rank"] == world.size - 1
        assert entry["record"]["stage"] == "register"
        assert f"{kind}.safetensors" in entry["message"]
        assert entry["seconds"] < AN_ERROR_IS_PROMPT_SECONDS
    assert [entry["error"] for entry in world.results(f"after {kind}")] == [None] * world.size


def test_tensors_of_every_rank_reach_every_worker(world: World) -> None:
    expected = world.ranks[0]["expected"]
    for held in weights(world, "tensors"):
        assert expected.items() <= held.items()


def test_nothing_is_left_behind(world: World) -> None:
    assert list(world.socket_dir.iterdir()) == [], "socket directories must go with their owners"
    for rank in world.ranks:
        for scenario, entry in rank.items():
            if scenario == "expected":
                continue
            assert not [t for t in entry["threads"] if t not in THREADS_BETWEEN_UPDATES], scenario
            assert {*entry["sockets"]} <= {"lock", "control"}, scenario
        # Process-wide: the groups, the store and a round's pipe may come and go; a leak would add up.
        assert rank["tensors"]["fds"] <= rank["first"]["fds"] + 8
        workers = [rank[scenario]["worker"] for scenario in ("first", "after skipped by one")]
        # ZeroMQ closes in its own thread: one connection may linger, but not one for each of 15 updates.
        assert workers[1]["fds"] <= workers[0]["fds"] + 4
    assert not [name for name in os.listdir("/dev/shm") if "ckpt" in name]
