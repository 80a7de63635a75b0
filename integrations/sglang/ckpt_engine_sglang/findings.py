"""What `ckpt-engine doctor` says of SGLang: which one is here, and whether the plugin runs in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_engine.findings import Finding, Level, installed_version, plugin_finding
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
    return plugin_finding("SGLang", "sglang.srt.plugins", PLUGINS, environment)
