"""What travels when ranks gather, and that every rank ends with what all of them hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import pytest

from ckpt_engine.errors import ProtocolError
from ckpt_engine.gathering import Gathered, Gathering
from ckpt_engine.metadata import HostBufferMeta, RankMetas, TensorMeta


def held(rank: int, epoch: str, address: int = 4096, names: tuple[str, ...] = ("a", "b")) -> RankMetas:
    tensors = tuple(
        TensorMeta(name=f"{rank}.{name}", dtype="float32", shape=(1,), nbytes=4, offset=256 * place)
        for place, name in enumerate(names)
    )
    return RankMetas(
        rank=rank,
        host="h",
        host_ip="10.0.0.1",
        device_uuid=f"CPU-h-{rank}",
        epoch=epoch,
        buffers=(HostBufferMeta(address=address, nbytes=256 * len(names), tensors=tensors),),
    )


class Fleet:
    """Ranks in threads. `sent`: bytes that each meeting moved, by purpose."""

    def __init__(self, size: int) -> None:
        self.ranks = [Gathering() for _ in range(size)]
        self.sent: list[tuple[str, int]] = []
        self.tampers: Callable[[str, int, bytes], bytes] = lambda purpose, rank, brought: brought

    def gather(self, shares: list[RankMetas], lost_later: int | None = None) -> list[Gathered | Exception]:
        """`lost_later`: a rank that is gone when layouts are to be sent."""
        barrier = threading.Barrier(len(shares))
        brought: dict[tuple[str, int], bytes] = {}
        results: dict[int, Gathered | Exception] = {}

        def run(rank: int, mine: RankMetas) -> None:
            def meet(purpose: str, payload: Callable[[], bytes]) -> Mapping[int, bytes]:
                if not (purpose and rank == lost_later):
                    brought[purpose, rank] = self.tampers(purpose, rank, payload())
                barrier.wait(30)
                met = {who: what for (why, who), what in brought.items() if why == purpose}
                if rank == 0:
                    self.sent.append((purpose, sum(map(len, met.values()))))
                return met

            try:
                results[rank] = self.ranks[rank].gather(lambda: mine, meet)
            except Exception as error:  # noqa: BLE001 - what was raised is the result
                results[rank] = error

        threads = [threading.Thread(target=run, args=(mine.rank, mine)) for mine in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[mine.rank] for mine in shares]


def agreed(results: list[Gathered | Exception], shares: list[RankMetas]) -> None:
    for result in results:
        assert isinstance(result, Gathered), result
        assert result.metas == {mine.rank: mine for mine in shares}
        assert result.layouts == results[0].layouts  # type: ignore[union-attr]


def test_layouts_travel_once_for_all_epochs() -> None:
    fleet = Fleet(3)
    for step in range(4):
        shares = [held(rank, f"step {step} of {rank}") for rank in range(3)]
        agreed(fleet.gather(shares), shares)
    assert [purpose for purpose, _ in fleet.sent] == ["", "layouts", "", "", ""]
    assert [rank.layouts_sent for rank in fleet.ranks] == [1, 1, 1]


def test_two_arenas_in_turn_are_both_kept_and_a_third_is_not() -> None:
    fleet = Fleet(2)

    def step(number: int, address: int) -> None:
        shares = [held(rank, f"{number} of {rank}", address) for rank in range(2)]
        agreed(fleet.gather(shares), shares)

    for number in range(6):
        step(number, 4096 * (1 + number % 2))
    assert fleet.ranks[0].layouts_sent == 2
    for number in range(6, 12):
        step(number, 4096 * (1 + number % 3))
    assert fleet.ranks[0].layouts_sent == 2 + 4


def test_one_changed_share_or_one_new_process_makes_all_send_again() -> None:
    fleet = Fleet(2)
    shares = [held(0, "x"), held(1, "x")]
    agreed(fleet.gather(shares), shares)
    shares = [held(0, "y"), held(1, "y", names=("a", "c"))]
    agreed(fleet.gather(shares), shares)
    assert [rank.layouts_sent for rank in fleet.ranks] == [2, 2]
    fleet.ranks[0] = Gathering()
    agreed(fleet.gather(shares), shares)
    assert [rank.layouts_sent for rank in fleet.ranks] == [1, 3]


def test_ranks_that_hold_nothing_are_there_too() -> None:
    fleet = Fleet(2)
    empty = held(1, "").model_copy(update={"buffers": ()})
    for _ in range(2):
        shares = [held(0, "x"), empty]
        agreed(fleet.gather(shares), shares)
    assert fleet.ranks[0].layouts_sent == 1


def test_a_rank_that_is_gone_when_layouts_are_sent_is_left_out() -> None:
    fleet = Fleet(3)
    shares = [held(rank, "x") for rank in range(3)]
    results = fleet.gather(shares, lost_later=2)
    for result in results[:2]:
        assert isinstance(result, Gathered)
        assert set(result.metas) == {0, 1} == set(result.layouts)
    agreed(fleet.gather(shares[:2]), shares[:2])
    assert fleet.ranks[0].layouts_sent == 1


@pytest.mark.parametrize(
    ("purpose", "instead", "text"),
    [
        ("", b"{}", "rank 1 is of another version"),
        ("layouts", b"[]", "rank 1 announced another layout"),
    ],
)
def test_what_is_not_as_announced_is_refused(purpose: str, instead: bytes, text: str) -> None:
    fleet = Fleet(2)
    fleet.tampers = lambda why, rank, what: instead if (why, rank) == (purpose, 1) else what
    results = fleet.gather([held(0, "x"), held(1, "x")])
    assert isinstance(results[0], ProtocolError)
    assert text in str(results[0])


def test_a_rank_that_claims_to_be_another_is_refused() -> None:
    fleet = Fleet(2)
    fleet.tampers = lambda why, rank, what: what.replace(b'"rank":1', b'"rank":0')
    results = fleet.gather([held(0, "x"), held(1, "x")])
    assert "rank 1 claims to be rank 0" in str(results[0])
