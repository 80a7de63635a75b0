"""What is logged, and how."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from ckpt_engine import ParameterServer, logs
from ckpt_engine.cli.main import app
from ckpt_engine.errors import ConfigError
from tests.support import loggers


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with loggers.put_back():
        yield


def test_a_stage_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("text", logging.INFO)
    logger = logging.getLogger("ckpt_engine.test")
    logs.tell_stage(logger, "buckets", 1.25, rank=3, checkpoint="step-7", version="v7")
    logs.tell_stage(logger, "begin", 0.5, rank=3, checkpoint="step-8", error=ValueError("no"))
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("INFO ckpt_engine.test: rank 3: buckets of 'step-7' as version v7 took 1.250 s")
    assert second.endswith("rank 3: begin of 'step-8' failed (ValueError) after 0.500 s")


def test_a_stage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("json", logging.INFO)
    logger = logging.getLogger("ckpt_engine.test")
    logs.tell_stage(logger, "buckets", 1.25, rank=3, checkpoint="step-7", version="v7", nbytes=5)
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "ckpt_engine.test",
        "rank": 3,
        "message": "rank 3: buckets of 'step-7' as version v7 took 1.250 s",
        "stage": "buckets",
        "checkpoint": "step-7",
        "version": "v7",
        "seconds": 1.25,
        "outcome": "done",
        "nbytes": 5,
    }


def test_other_lines_have_the_launchers_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.to_stderr("text", logging.INFO)
    logs.to_stderr("json", logging.WARNING)  # in its place
    logger = logging.getLogger("ckpt_engine_vllm.test")
    logger.info("not shown")
    monkeypatch.setenv("RANK", "5")
    try:
        raise ConfigError("this\nand that")
    except ConfigError:
        logger.exception("it failed")
    monkeypatch.delenv("RANK")
    logger.warning("nobody's")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["rank"], first["message"], first["level"]) == (5, "it failed", "ERROR")
    assert "ConfigError: this" in first["traceback"]
    assert (second["rank"], "traceback" in second) == (None, False)


def test_a_parameter_server_tells_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("json", logging.INFO)
    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        ps.register_checkpoint("step-1", named_tensors={"w": torch.zeros(100)})
        ps.gather_metas("step-1")
        with pytest.raises(ConfigError):
            ps.register_checkpoint("", named_tensors={})
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    stages = [(line["stage"], line["checkpoint"], line["outcome"]) for line in told if "stage" in line]
    assert stages == [
        ("register", "step-1", "done"),
        ("gather", "step-1", "done"),
        ("register", "", "failed"),
    ]
    assert next(line for line in told if line.get("stage") == "register")["nbytes"] == 400
    assert all(line["rank"] == 0 and line["seconds"] >= 0 for line in told if "stage" in line)


def test_a_bad_format_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_LOG_FORMAT", "xml")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "CKPT_ENGINE_LOG_FORMAT='xml'" in result.output
