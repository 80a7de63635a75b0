"""What a rank remembers of who holds what, when other ranks are gone."""

from __future__ import annotations

import pytest

from ckpt_engine.errors import CheckpointError, ConfigError
from ckpt_engine.gathered import GatheredMetas
from ckpt_engine.gathering import Gathered
from ckpt_engine.metadata import HostBufferMeta, Metas, RankMetas, TensorMeta

GONE = {1: "its process ended"}


def metas(**held: list[str]) -> Metas:
    """`r0=["a", "b"]`: rank 0 holds tensors a and b."""
    found = {}
    for key, names in held.items():
        rank = int(key[1:])
        tensors = tuple(
            TensorMeta(name=name, dtype="float32", shape=(1,), nbytes=4, offset=256 * place)
            for place, name in enumerate(names)
        )
        found[rank] = RankMetas(
            rank=rank,
            host="h",
            host_ip="10.0.0.1",
            device_uuid=f"CPU-h-{rank}",
            epoch=f"epoch-{rank}",
            buffers=(HostBufferMeta(address=4096, nbytes=256 * len(names), tensors=tensors),),
        )
    return found


def put(gathered: GatheredMetas, name: str, held: Metas, lost: dict[int, str], registered: list[str]) -> None:
    layouts = {rank: f"layout of {rank}" for rank in held}
    gathered.put(name, Gathered(metas=held, layouts=layouts), lost, registered)


@pytest.fixture
def gathered() -> GatheredMetas:
    return GatheredMetas(0)


def test_what_a_lost_rank_may_have_held_is_not_left_out_in_silence(gathered: GatheredMetas) -> None:
    with pytest.raises(CheckpointError, match=r"rank 1 \(its process ended\).*ranks=\[0, 2\]"):
        put(gathered, "new", metas(r0=["a"], r2=["b"]), GONE, ["new"])
    with pytest.raises(CheckpointError):
        gathered.of("new", "epoch-0", ["new"], [0, 2])


def test_what_a_lost_rank_held_is_named(gathered: GatheredMetas) -> None:
    put(gathered, "step", metas(r0=["a"], r1=["b"], r2=["c"]), {}, ["step"])
    with pytest.raises(CheckpointError, match=r"1 tensors of 'step' \('b' first\)"):
        put(gathered, "step", metas(r0=["a"], r2=["c"]), GONE, ["step"])


def test_once_others_hold_it_all_a_lost_rank_is_no_loss(gathered: GatheredMetas) -> None:
    put(gathered, "step", metas(r0=["a"], r1=["b"], r2=["c"]), {}, ["step"])
    put(gathered, "step", metas(r0=["a", "b"], r2=["c"]), GONE, ["step"])
    assert set(gathered.of("step", "epoch-0", ["step"], [0, 2]).metas) == {0, 2}


def readable(held: Metas, *ranks: int) -> Metas:
    """These ranks published addresses."""
    address = {"p2p_address": "10.0.0.1:1", "lease_address": "10.0.0.1:2", "p2p_transport": "tcp"}
    return held | {rank: held[rank].model_copy(update=address) for rank in ranks}


def test_owners_that_nobody_can_read_are_needed(gathered: GatheredMetas) -> None:
    put(gathered, "step", metas(r0=[], r1=["b"], r2=[]), {}, ["step"])
    assert gathered.members("step", [0]) == (0, 1)
    assert gathered.members("step", [1]) == (1,)


def test_owners_that_can_be_read_are_not_needed_by_those_who_can_read(gathered: GatheredMetas) -> None:
    held = metas(r0=["a"], r1=["b"], r2=["c"], r3=[])
    put(gathered, "step", readable(held, 0, 1), {}, ["step"])
    assert gathered.members("step", [0]) == (0, 2), "nobody can read rank 2"
    assert gathered.members("step", [3]) == (0, 1, 2, 3), "rank 3 cannot read"
    assert gathered.members("step", [1, 3]) == (1, 2, 3)
    senders = gathered.of("step", "epoch-0", ["step"], [0, 2])
    assert (set(senders.metas), set(senders.outside)) == ({0, 2}, {1})
    assert senders.has_sources
    assert not gathered.of("step", "epoch-0", ["step"], [0, 1, 2]).has_sources


def test_a_device_that_two_ranks_have_is_refused(gathered: GatheredMetas) -> None:
    held = metas(r0=["a"], r1=["b"])
    held[1] = held[1].model_copy(update={"device_uuid": held[0].device_uuid})
    with pytest.raises(ConfigError, match=r"ranks 0 and 1 both have device CPU-h-0.*CKPT_ENGINE_DEVICE_UUID"):
        put(gathered, "step", held, {}, ["step"])
    with pytest.raises(CheckpointError):
        gathered.of("step", "epoch-0", ["step"], [0, 1])


def of_fleet(session: str, held: Metas) -> Metas:
    """Readable, with the same shares as any other fleet's of these."""
    return {
        rank: one.model_copy(
            update={
                "session": f"{session}-{rank}",
                "checkpoint": "step",
                "buffers": tuple(buffer.model_copy(update={"origin": "o"}) for buffer in one.buffers),
            }
        )
        for rank, one in readable(held, *held).items()
    }


def test_a_fleet_that_keeps_what_it_joined_is_told_of_before_those(gathered: GatheredMetas) -> None:
    owners, others = of_fleet("owners", metas(r0=["a"], r1=["b"])), of_fleet("others", metas(r0=["a", "b"]))
    gathered.load([owners, others, owners])
    assert gathered.fleets == (owners, others)
    mine = of_fleet("mine", metas(r0=["a", "b"]))
    for _ in range(2):  # also when it gathers again
        put(gathered, "step", mine, {}, ["step"])
        assert gathered.fleets == (mine, owners, others)
        assert gathered.shown == mine
    senders = gathered.of("step", "epoch-0", ["step"], [0])
    assert (senders.metas, senders.has_sources) == (mine, False)


def test_other_weights_of_the_same_name_are_not_those_that_were_joined(gathered: GatheredMetas) -> None:
    owners = of_fleet("owners", metas(r0=["a"]))
    gathered.load([owners])
    mine = {
        rank: one.model_copy(update={"epoch": "new", "buffers": metas(r0=["a"])[0].buffers})
        for rank, one in of_fleet("mine", metas(r0=["a"])).items()
    }
    put(gathered, "step", mine, {}, ["step"])
    assert gathered.fleets == (mine,)


def test_who_joins_another_fleet_must_say_which_ranks(gathered: GatheredMetas) -> None:
    """Its owners' ranks are not this fleet's, whatever their numbers."""
    gathered.load([of_fleet("owners", metas(r0=["a"], r5=["b"]))])
    with pytest.raises(ConfigError, match=r"held by another fleet.* with ranks=\[\.\.\.\]"):
        gathered.members("step", [0, 1], all_ranks=True)
    assert gathered.members("step", [1]) == (1,)
    assert gathered.of("step", "", [], [1]).metas == {}
