from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from ckpt_engine.cli import doctor
from ckpt_engine.findings import Finding, Level
from ckpt_engine.settings import Settings

Cli = Callable[..., Any]


def find_much(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding("ports", Level.WARNING, "taken\nby \x1b[31mothers", remedy="set others")
    yield Finding("host", Level.OK, f"{settings.host_id} {environment['TEST_DOCTOR']}")


def find_an_error(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding("memory", Level.ERROR, "none")


def find_nothing_but_trouble(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding("before", Level.OK, "said before it failed")
    raise KeyError("missing")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("TEST_DOCTOR", "seen")

    def choose(*names: str) -> None:
        monkeypatch.setattr(doctor, "CHECKS", tuple(f"{__name__}:{name}" for name in names))

    return choose


def test_findings_are_printed_with_their_remedies(cli: Cli, checks: Callable[..., None]) -> None:
    checks("find_much")
    result = cli("doctor")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "warning  ports  taken",
        "                by \\x1b[31mothers",
        "                remedy: set others",
        "ok       host   here seen",
    ]


def test_an_error_is_the_exit_status(cli: Cli, checks: Callable[..., None]) -> None:
    checks("find_an_error", "find_much")
    result = cli("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output) == [
        {"subject": "memory", "level": "error", "message": "none", "remedy": ""},
        {
            "subject": "ports",
            "level": "warning",
            "message": "taken\nby \x1b[31mothers",
            "remedy": "set others",
        },
        {"subject": "host", "level": "ok", "message": "here seen", "remedy": ""},
    ]


def test_a_check_that_fails_is_an_error_among_the_others(cli: Cli, checks: Callable[..., None]) -> None:
    checks("find_nothing_but_trouble", "not_there", "find_much")
    result = cli("doctor", "--json")
    assert result.exit_code == 1
    levels = [(finding["subject"], finding["level"]) for finding in json.loads(result.output)]
    assert levels == [
        ("before", "ok"),
        (__name__, "error"),
        (__name__, "error"),
        ("ports", "warning"),
        ("host", "ok"),
    ]
    assert "this check failed: KeyError: 'missing'" in result.output


def test_the_checks_of_this_package_run_here(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = cli("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found[0]["subject"] == "devices"
    if found[0]["message"] == "cpu":
        assert found[1] == {"subject": "cpu 0", "level": "ok", "message": "CPU-here-0", "remedy": ""}


def test_bad_settings_are_one_message(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_SLOT_COUNT", "none")
    result = cli("doctor")
    assert result.exit_code == 1
    assert "CKPT_ENGINE_SLOT_COUNT" in result.output
