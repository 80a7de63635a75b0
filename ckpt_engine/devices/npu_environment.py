"""What the environment must say for updates on Ascend NPUs, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckpt_engine.errors import ConfigError

ALLOCATOR_VARIABLE = "PYTORCH_NPU_ALLOC_CONF"
PORT_VARIABLES = ("HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_HOST_SOCKET_PORT_RANGE")
EXECUTION_TIMEOUT = "HCCL_EXEC_TIMEOUT"

_PORTS = re.compile(r"auto|\d+(-\d+)?(,\d+(-\d+)?)*")


def refuse_expandable_segments(environment: Mapping[str, str]) -> None:
    """Raises ConfigError: this process' allocator makes memory that cannot be exported."""
    value = environment.get(ALLOCATOR_VARIABLE, "")
    if "expandable_segments:true" in value.replace(" ", "").lower():
        raise ConfigError(
            f"{ALLOCATOR_VARIABLE}={value!r}: memory in expandable segments cannot be shared. "
            f"Start the parameter server with {ALLOCATOR_VARIABLE}=expandable_segments:False (the engine may "
            "keep it: vllm-ascend sets it for itself and for every process that it starts)"
        )


def port_problem(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """What is wrong with the ports that hccl would use, and the remedy; None where they are set."""
    missing = [name for name in PORT_VARIABLES if not environment.get(name)]
    wrong = [
        f"{name}={environment[name]!r}"
        for name in PORT_VARIABLES
        if name not in missing and not _PORTS.fullmatch(environment[name])
    ]
    if wrong:
        return (
            f"{' and '.join(wrong)}: neither 'auto' nor ports such as 61000-61050",
            "set both variables to 'auto' on every rank and for the engine",
        )
    if missing:
        return (
            f"{' and '.join(missing)} not set: hccl listens on port 16666 of the NPU, where the engine's own "
            "communicator may listen already",
            "set both variables to 'auto' on every rank and for the engine (CANN 8.1 or newer)",
        )
    return None


def require_execution_timeout(environment: Mapping[str, str]) -> None:
    """Raises ConfigError: a broadcast that nobody can abort might wait for a lost rank for ever."""
    value = environment.get(EXECUTION_TIMEOUT, "")
    if not value.isdecimal() or int(value) == 0:
        raise ConfigError(
            f"CKPT_ENGINE_CUSTOM_DIST=vllm_hccl needs {EXECUTION_TIMEOUT} (it is {value!r}): vllm-ascend's "
            "communicator cannot be aborted, so a broadcast whose root is gone ends only then. Set it to "
            "more seconds than the longest broadcast takes, such as 60, on every rank"
        )
