"""Which group a rank uses: the one it kept, if it is its members' own and all of them still have it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ckpt_engine.transport.collectives import Collectives
from ckpt_engine.update import movers


class Fleet:
    """Ranks that keep groups, which are only names here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(movers, "make_group", lambda kind, store, name, *rest, **poll: name)
        self._ranks: list[Any] = [SimpleNamespace(rank=rank, group=None, group_name="") for rank in range(12)]
        for rank in self._ranks:
            rank.control = rank.device = SimpleNamespace(store=None, index=0)
            rank.drop_groups = lambda rank=rank: rank.__dict__.update(group=None, group_name="")
        self._round = 0

    def update(self, *members: int, kind: str = "gloo") -> set[Collectives | None]:
        """The groups that the members then use."""
        self._round += 1
        names = {member: SimpleNamespace(group_name=self._ranks[member].group_name) for member in members}
        meeting: Any = SimpleNamespace(name=f"round-{self._round}", by_rank=names)
        part: Any = SimpleNamespace(reactor=None, deadline=None)
        return {movers._group(self._ranks[member], meeting, part, members, kind) for member in members}

    def forget(self, rank: int) -> None:
        self._ranks[rank].drop_groups()


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(monkeypatch)


def test_the_same_members_keep_their_group(fleet: Fleet) -> None:
    first = fleet.update(0, 1, 2)
    assert len(first) == 1
    assert fleet.update(0, 1, 2) == first


@pytest.mark.parametrize(
    ("before", "members"),
    [
        ((0, 1, 2), (0, 1)),
        ((0, 1, 2), (1, 2)),
        ((0, 1), (0, 1, 2)),
        ((0, 10), (0, 1)),
        ((1, 10), (1, 10, 11)),
    ],
)
def test_other_members_never_get_it(fleet: Fleet, before: tuple[int, ...], members: tuple[int, ...]) -> None:
    """One that is not called into an update would be waited for in its broadcasts."""
    old, new = fleet.update(*before), fleet.update(*members)
    assert len(new) == 1
    assert new != old


def test_another_kind_of_group_is_another_group(fleet: Fleet) -> None:
    assert fleet.update(0, 1, kind="nccl") != fleet.update(0, 1, kind="gloo")


def test_all_make_a_new_one_when_one_of_them_has_lost_it(fleet: Fleet) -> None:
    old = fleet.update(0, 1, 2)
    fleet.forget(1)
    new = fleet.update(0, 1, 2)
    assert len(new) == 1
    assert new != old


def test_a_lone_member_needs_none(fleet: Fleet) -> None:
    assert fleet.update(3) == {None}
