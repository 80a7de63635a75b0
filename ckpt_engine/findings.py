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
from importlib.metadata import PackageNotFoundError, entry_points, version

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


def plugin_finding(
    engine: str,
    group: str,
    variable: str,
    environment: Mapping[str, str],
    *,
    brings: str = "",
    instead: str = "",
) -> Finding:
    """Whether an engine loads our plugin.

    Args:
        group: the engine's, of entry points.
        variable: with which its users choose among plugins.
        brings: what the plugin gives the engine; `instead`: what does without it.
    """
    subject, wanted = f"{engine.lower()} plugin", environment.get(variable)
    if not any(point.name == "ckpt_engine" for point in entry_points(group=group)):
        remedy = f"install ckpt-engine in {engine}'s own environment (pip install, not PYTHONPATH)"
        return Finding(subject, Level.WARNING, f"{engine} does not find ckpt-engine's plugin", remedy)
    if wanted is not None and "ckpt_engine" not in wanted.split(","):
        lost = f", its {brings}" if brings else ""
        message = f"{variable}={wanted} keeps {engine} from loading ckpt_engine{lost}"
        remedy = f"add ckpt_engine to {variable}" + (f", or {instead}" if instead else "")
        return Finding(subject, Level.WARNING, message, remedy)
    return Finding(subject, Level.OK, f"found: {brings} ckpt_engine" if brings else "found")
