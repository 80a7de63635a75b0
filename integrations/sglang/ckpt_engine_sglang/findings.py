"""What `ckpt-engine doctor` says of SGLang: which one is here, and whether the plugin runs in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points

from ckpt_engine.findings import Finding, Level, installed_version
from ckpt_engine.settings import Settings

OLDEST, NEWEST = (0, 5, 15), (0, 5, 23)
"""Whose layout the plugin knows: integrations/sglang/README.md."""
PLUGINS = "SGLANG_PLUGINS"


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Nothing where there is no SGLang."""
    installed = installed_version("sglang")
    if installed is None:
        return
    yield supported(installed)
    yield plugin(environment)


def supported(installed: str) -> Finding:
    """By the versions whose layout is known."""
    numbers = (part.partition("rc")[0].partition("post")[0] for part in installed.split(".")[:3])
    release = tuple(int(part) for part in numbers if part.isdigit())
    if release < OLDEST:
        message = f"{installed} has no plugins that fit: its own handler can be served, with less checked"
        return Finding(
            "sglang", Level.WARNING, message, "use 0.5.15 or newer, or start it by `ckpt-engine compat --`"
        )
    if release > NEWEST:
        message = (
            f"{installed} is newer than any that was tried: what the plugin does not know it leaves to SGLang"
        )
        return Finding("sglang", Level.WARNING, message, "run `make test-sglang-other` on it first")
    return Finding("sglang", Level.OK, installed)


def plugin(environment: Mapping[str, str]) -> Finding:
    """Our entry point, without which SGLang's own handler takes updates."""
    wanted = environment.get(PLUGINS)
    if not any(point.name == "ckpt_engine" for point in entry_points(group="sglang.srt.plugins")):
        remedy = "install ckpt-engine in SGLang's own environment (pip install, not PYTHONPATH)"
        return Finding("sglang plugin", Level.WARNING, "SGLang does not find ckpt-engine's plugin", remedy)
    if wanted is not None and "ckpt_engine" not in wanted.split(","):
        message = f"{PLUGINS}={wanted} keeps SGLang from loading ckpt_engine"
        return Finding("sglang plugin", Level.WARNING, message, f"add ckpt_engine to {PLUGINS}")
    return Finding("sglang plugin", Level.OK, "found")
