"""What `ParameterServer` takes, from its arguments and from the environment, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt_engine import ParameterServer
from ckpt_engine.errors import ConfigError


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts the last of four ranks."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")


def test_rank_0_as_an_argument_is_rank_0() -> None:
    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        assert (ps.rank, ps.world_size) == (0, 1)


def test_what_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_MEM_FRACTION", "0.25")
    with ParameterServer(device="cpu", gpu_count=2) as ps:
        assert (ps.rank, ps.world_size, ps.local_rank, ps.mem_fraction) == (3, 4, 1, 0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 4},
        {"rank": -1},
        {"rank": "1"},
        {"rank": True},
        {"world_size": 0},
        {"world_size": 2.0},
        {"mem_fraction": 0},
        {"mem_fraction": 1.5},
        {"mem_fraction": "0.5"},
        {"mem_fraction": float("nan")},
        {"gpu_count": 0},
        {"gpu_count": "8"},
        {"master_port": 0},
        {"master_port": 65536},
        {"master_port": "29500"},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        ParameterServer(**{"device": "cpu"} | wrong)


@pytest.mark.parametrize(
    ("variable", "value"), [("RANK", "4"), ("RANK", "x"), ("WORLD_SIZE", "0"), ("PS_MEM_FRACTION", "2")]
)
def test_a_bad_variable_is_refused_by_its_name(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable):
        ParameterServer(device="cpu")
