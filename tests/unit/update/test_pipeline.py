"""Buckets through real pipelines and movers, in any order of events that devices, groups and workers allow.

The simulation raises when a slot is written while its worker or a reader has it, when a bucket is announced
out of order or before its bytes are there, when a staging buffer is written while it is sent, and when nobody
can go on. That it notices is tested, too: by taking the rules away one by one.
"""

from __future__ import annotations

import re

import pytest
from device_for_update_tests import SimulatedRing, SimulatedStaging
from fleet_for_update_tests import GLOO, HOST_MEMORY, NCCL, Case, Fleet, SimulatedChannel, cases
from hypothesis import HealthCheck, Phase, find, given, settings
from schedule_for_update_tests import Deadlock

from ckpt_engine.errors import UpdateError
from ckpt_engine.update import part as part_module
from ckpt_engine.update.device_movers import DirectMover
from ckpt_engine.update.host_mover import HostMover
from ckpt_engine.update.part import Part

reproducible = settings(
    derandomize=True,
    print_blob=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
only_look = settings(reproducible, phases=[Phase.generate], database=None, max_examples=300)


@pytest.fixture(autouse=True)
def no_sleep_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_module, "PAUSE_SECONDS", 1e-9)
    monkeypatch.setattr(part_module, "FIRST_PAUSE_SECONDS", 1e-9)


@pytest.mark.parametrize("kind", [HOST_MEMORY, NCCL, GLOO])
@reproducible
@given(case=cases())
def test_every_worker_gets_every_byte_and_nobody_is_disturbed(case: Case, kind: str) -> None:
    fleet = Fleet(case, kind)
    for number in range(2):
        fleet.update(number)


def _copies_all(mover: DirectMover) -> None:
    """Without a look at whether the slots are free."""
    for item in mover._part.plan.buckets:
        if not mover._part.is_here(item):
            return
        mover._copy(item)
        mover._begun += 1


@pytest.mark.parametrize(
    ("kind", "where", "rule", "instead", "what"),
    [
        (HOST_MEMORY, Part, "wait_for_worker", None, "disturbs"),
        (HOST_MEMORY, HostMover, "is_sent_on", True, "disturbs"),
        (HOST_MEMORY, HostMover, "_free", True, "disturbs"),
        (NCCL, SimulatedRing, "is_ready", True, "is not there"),
        (NCCL, SimulatedRing, "is_given_back", True, "disturbs"),
        (GLOO, SimulatedRing, "is_given_back", True, "disturbs"),
        (NCCL, SimulatedStaging, "mark_emptied", None, "disturbs|is not there"),
        (NCCL, SimulatedStaging, "mark_filled", None, "disturbs|is not there"),
        (GLOO, SimulatedStaging, "mark_filled", None, "disturbs|is not there"),
        (NCCL, DirectMover, "begin", _copies_all, "is not there"),
        (HOST_MEMORY, SimulatedChannel, "give_back", None, "waits for"),
        (NCCL, SimulatedRing, "is_given_back", False, "waits for"),
        (HOST_MEMORY, Part, "let_go", None, "waits for"),
        (NCCL, Part, "let_go", None, "waits for"),
    ],
)
def test_the_simulation_notices_when_a_rule_is_gone(
    monkeypatch: pytest.MonkeyPatch, kind: str, where: type, rule: str, instead: object, what: str
) -> None:
    monkeypatch.setattr(where, rule, instead if callable(instead) else lambda *arguments: instead)
    errors: list[Exception] = []

    def fails(case: Case) -> bool:
        try:
            Fleet(case, kind).update(0)
        except (AssertionError, UpdateError) as error:
            errors.append(error)
        return bool(errors)

    find(cases(), fails, settings=only_look)
    assert re.search(what, str(errors[0]))
    assert isinstance(errors[0], Deadlock) == (what == "waits for")
