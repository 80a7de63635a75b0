"""Groups: ours are private and kept, or released on demand; the caller's default group is never touched.

Every rank is a host of its own here, so that every update of several ranks broadcasts in a group.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.conftest import torchrun
from tests.support import groups
from tests.support.worker import digest

SIZE = 3
ALL, ONE, TWO = [0, 1, 2], [0, 1], [0, 2]
SCENARIOS = [
    # scenario, checkpoint, members, those updated, whether a group must be made
    ("first", "all", ALL, ALL, True),
    ("again", "all", ALL, ALL, False),
    ("subset 1", "zero", ONE, [1], True),
    ("subset 1 again", "zero", ONE, ONE, False),
    ("subset 2", "zero", TWO, TWO, True),
    ("subset 2 again", "zero", TWO, TWO, False),
    ("alone", "zero", [0], [0], False),
    ("subset 2 after alone", "zero", TWO, [2], False),
    ("all after subsets", "all", ALL, ALL, True),
    ("others give", "all", ALL, TWO, False),
    ("others give again", "all", ALL, TWO, False),
    ("after a failure", "all", ALL, ALL, True),
    ("after that", "all", ALL, ALL, False),
    ("second parameter server", "all", ALL, ALL, True),
]


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "released"])
def released(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def ranks(released: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Scenario -> what happened, by rank."""
    out = tmp_path_factory.mktemp("groups")
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as sockets:
        torchrun(
            SIZE,
            "tests.support.groups",
            str(out),
            timeout=240,
            CKPT_ENGINE_RELEASE_GROUPS=str(released),
            CKPT_ENGINE_SLOT_MIB="1",
            CKPT_ENGINE_SOCKET_DIR=sockets,
            GLOO_SOCKET_IFNAME="lo",
        )
        yield [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize(("scenario", "name", "members", "updated"), [row[:4] for row in SCENARIOS])
def test_just_the_ranks_asked_for_are_updated(
    ranks: list[dict[str, Any]], scenario: str, name: str, members: list[int], updated: list[int]
) -> None:
    expected = {key: digest(tensor) for key, tensor in groups.checkpoint(name, SIZE).items()}
    for rank, seen in enumerate(ranks):
        assert seen[scenario]["error"] is None, f"rank {rank}"
        assert seen[scenario]["asked"] == (rank in updated)
        if rank in updated:
            assert expected.items() <= seen[scenario]["held"].items()


@pytest.mark.parametrize(("scenario", "members", "new"), [(row[0], row[2], row[4]) for row in SCENARIOS])
def test_a_group_is_made_only_when_its_members_have_none(
    ranks: list[dict[str, Any]], released: bool, scenario: str, members: list[int], new: bool
) -> None:
    count = int(len(members) > 1 and (new or released))
    made = [seen[scenario]["made"] for seen in ranks]
    assert [len(names) for names in made] == [count if rank in members else 0 for rank in range(SIZE)]
    assert len({name for names in made for name in names}) == count, "its members call it by one name"
    for rank in members:
        # A lone rank needs none: what it has may stay.
        assert ranks[rank][scenario]["kept"] == (not released)


def test_after_a_failure_no_group_is_used_again(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "injected in bucket 2" in seen["fails"]["error"]
        assert not seen["fails"]["kept"]


def test_the_callers_default_group_works_after_every_update(ranks: list[dict[str, Any]]) -> None:
    everybody = sum(range(1, SIZE + 1))
    for seen in ranks:
        for scenario in (*(row[0] for row in SCENARIOS), "fails"):
            assert seen[scenario]["default"] == everybody, scenario
        assert seen["default after close"] == seen["default at the end"] == everybody
        assert seen["the caller's group is the default one"]


def test_without_a_default_group_the_caller_is_told_what_to_call(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["without a group"].startswith("ConfigError: auto_pg=False: call init_process_group()")
