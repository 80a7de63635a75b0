"""`ckpt-engine doctor`: what would keep updates from working here, each thing with its remedy.

What is looked at comes from the parts of the package that know it: see `ckpt_engine.findings`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from ckpt_engine.cli import AsJson, Verbose, printable

if TYPE_CHECKING:
    from ckpt_engine.findings import Finding
    from ckpt_engine.settings import Settings

CHECKS: tuple[str, ...] = (
    "ckpt_engine.devices.findings:find",
    "ckpt_engine.checkpoint.findings:find",
    "ckpt_engine.ipc.findings:find",
    "ckpt_engine.transport.findings:find",
    "ckpt_engine.transport.readiness:find",
    "ckpt_engine_vllm.findings:find",
    "ckpt_engine_sglang.findings:find",
    "ckpt_engine_ascend.findings:find",
)
"""`module:function` of each check (`findings.Find`), in the order of what is printed."""


def doctor(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Say what would keep updates from working here.

    Run it where a parameter server or an engine runs, in the same environment. Exit status 1: there is an
    error among what was found.
    """
    from ckpt_engine.findings import Level
    from ckpt_engine.settings import load_settings

    # Else torch's import would load torch_npu with it, and fail, or crash, with it where CANN is not set up.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    found = list(examine(CHECKS, load_settings(), os.environ))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        _show(found)
    if any(finding.level is Level.ERROR for finding in found):
        raise typer.Exit(1)


def examine(checks: Sequence[str], settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What each check finds; one that fails itself is an error among the others."""
    from ckpt_engine.findings import Finding, Level

    for check in checks:
        module, _, name = check.partition(":")
        try:
            yield from getattr(importlib.import_module(module), name)(settings, environment)
        except Exception as error:  # noqa: BLE001 - the other checks still have something to say
            message = f"this check failed: {type(error).__name__}: {error}"
            yield Finding(module, Level.ERROR, message)


def _show(found: Sequence[Finding]) -> None:
    width = max((len(finding.subject) for finding in found), default=0)
    for finding in found:
        head = f"{finding.level.value:<7}  {printable(finding.subject):<{width}}  "
        first, *rest = finding.message.splitlines() or [""]
        typer.echo(head + printable(first))
        for line in [*rest, *([f"remedy: {finding.remedy}"] if finding.remedy else [])]:
            typer.echo(" " * len(head) + printable(line))
