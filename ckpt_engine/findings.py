"""What `ckpt-engine doctor` says: one finding for each thing that was looked at, with its remedy.

A part of the package, or an adapter, contributes a function (`Find`) and its place in `cli.doctor.CHECKS`:

    def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
        if not environment.get("SOME_VARIABLE"):
            yield Finding("some", Level.WARNING, "SOME_VARIABLE is not set", remedy="set it to 'auto'")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version

from ckpt_engine.settings import Settings


class Level(str, Enum):
    """`error`: updates will fail; `warning`: they may, or for some set-ups."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """`subject`: a word or two, such as `npu ports`. `remedy`: what to do, where anything is to be done and
    the message does not say it."""

    subject: str
    level: Level
    message: str
    remedy: str = ""


Find = Callable[[Settings, Mapping[str, str]], Iterable[Finding]]
"""Looks at this machine, with the settings and the environment of the command; changes nothing."""


def installed_version(package: str) -> str | None:
    """Of a distribution; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
