"""What `ckpt-engine doctor` says of Ascend NPUs: torch_npu, each NPU's key, and what the environment sets.

Nothing where there is no trace of an NPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ckpt_engine.devices import npu
from ckpt_engine.devices.npu_environment import PORT_VARIABLES, port_problem, refuse_expandable_segments
from ckpt_engine.errors import CkptEngineError, ConfigError
from ckpt_engine.findings import Finding, Level
from ckpt_engine.settings import Settings
from ckpt_engine_ascend.identity import NAME_IT, device_uuid, ways_out
from ckpt_engine_ascend.npu_smi import NpuSmi

DRIVER = Path("/dev/davinci_manager")
RANK_TABLE = "RANK_TABLE_FILE"
_INSTALL = "install the torch_npu that fits this torch, and source CANN's set_env.sh"


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """See the module."""
    installed = importlib.util.find_spec("torch_npu") is not None
    if not (installed or shutil.which("npu-smi") or DRIVER.exists()):
        return
    yield from _npu_smi()
    if installed:
        yield from _devices(settings)
    else:
        yield Finding("torch_npu", Level.ERROR, "is not installed: no NPU can be used from here", _INSTALL)
    yield from _environment(environment)


def _npu_smi() -> Iterator[Finding]:
    smi = NpuSmi()
    chips = smi.chips()
    said = "\n".join(answer.describe() for answer in smi.useless)
    if not chips:
        # An error only if a key depends on it: that is said of the key.
        remedy = ways_out(said) or "run `npu-smi info -m` here, and see what it says"
        yield Finding("npu-smi", Level.WARNING, f"lists no NPU\n{said}", f"{remedy} {NAME_IT}")
        return
    yield Finding("npu-smi", Level.OK, f"lists {len(chips)} chips of {len({c.npu_id for c in chips})} NPUs")


def _devices(settings: Settings) -> Iterator[Finding]:
    try:
        torch_npu = npu.load()
        count = int(torch_npu.device_count())
    except (ConfigError, RuntimeError) as error:
        yield Finding("torch_npu", Level.ERROR, str(error))
        return
    if not count:
        remedy = "look at ASCEND_RT_VISIBLE_DEVICES (ids must ascend), and at the container's --device flags"
        yield Finding("torch_npu", Level.ERROR, "sees no NPU", remedy)
        return
    yield Finding("torch_npu", Level.OK, f"sees {count} NPUs")
    for index in range(count):
        yield _key(settings, index)


def _key(settings: Settings, index: int) -> Finding:
    subject = f"npu {index}"
    with contextlib.suppress(CkptEngineError):
        # By its logic id, without taking memory of an NPU that an engine may have filled.
        return Finding(subject, Level.OK, device_uuid(index, settings=settings))
    try:
        return Finding(subject, Level.OK, npu.npu_uuid(settings, index))
    except (CkptEngineError, RuntimeError) as error:
        return Finding(subject, Level.ERROR, str(error))


def _environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    problem = port_problem(environment)
    if problem:
        yield Finding("npu ports", Level.WARNING, *problem)
    else:
        yield Finding("npu ports", Level.OK, " ".join(f"{n}={environment[n]}" for n in PORT_VARIABLES))
    try:
        refuse_expandable_segments(environment)
    except ConfigError as error:
        # The engine's own environment may be like that.
        yield Finding("npu memory", Level.WARNING, str(error))
    table = environment.get(RANK_TABLE)
    if table:
        yield _rank_table(table)


def _rank_table(path: str) -> Finding:
    try:
        json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        message = f"{RANK_TABLE}={path!r} cannot be read: {error}"
        return Finding(
            "rank table", Level.ERROR, message, "make it valid JSON (without comments), or unset it"
        )
    return Finding("rank table", Level.OK, path)
