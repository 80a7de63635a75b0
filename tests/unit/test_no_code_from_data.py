"""No pickle, no eval, no class looked up by a name that came from outside: the source is read for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("ckpt_engine", "integrations", "examples") for path in (ROOT / folder).rglob("*.py")
)

MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "jsonpickle", "joblib", "marshal", "shelve",
    "yaml", "runpy", "code", "codeop", "imp", "xmlrpc", "pickletools", "copyreg",
    "torch.package", "multiprocessing.connection", "multiprocessing.managers", "torch.distributed.rpc",
}  # fmt: skip
"""Each of them makes objects, or runs code, of bytes."""
CALLS = {
    "eval", "exec", "compile", "__import__", "execfile",
    "torch.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "os.system", "os.popen",
    "importlib.util.spec_from_file_location", "subprocess.getoutput", "subprocess.getstatusoutput",
    "dist.broadcast_object_list", "dist.all_gather_object", "dist.gather_object", "dist.scatter_object_list",
    "dist.send_object_list", "dist.recv_object_list",
}  # fmt: skip
METHODS = {
    "recv_pyobj", "send_pyobj", "exec_module", "load_module", "all_gather_object", "broadcast_object_list",
    "gather_object", "scatter_object_list",
}  # fmt: skip
"""Of whatever they are called on: ZeroMQ's and torch's that pickle, and importers."""
KEYWORDS = {"allow_pickle": False, "shell": False, "weights_only": True, "verify": True}
"""What these arguments may be, where they are given."""

_TABLE = "its own table of names"
EXCEPTIONS = {
    # An unpickler that looks up no class and calls nothing but tuple (SECURITY.md); no load path imports it.
    ("ckpt_engine/cli/pickled_sidecars.py", "import pickle"): "the converter of trusted sidecars",
    ("ckpt_engine/cli/pickled_sidecars.py", "import pickletools"): "reads it without running it",
    ("ckpt_engine/__init__.py", "import_module of a name"): _TABLE,
    ("ckpt_engine/cli/doctor.py", "import_module of a name"): _TABLE,
    ("integrations/vllm/ckpt_engine_vllm/__init__.py", "import_module of a name"): _TABLE,
    ("integrations/vllm/ckpt_engine_vllm/health.py", "import_module of a name"): (
        "the operator's own --worker-extension-cls, which vLLM imports by that name too"
    ),
    ("integrations/ascend/ckpt_engine_ascend/__init__.py", "import_module of a name"): _TABLE,
    ("integrations/sglang/ckpt_engine_sglang/versions.py", "import_module of a name"): _TABLE,
}
"""(file, what is found there) -> why it may be."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def findings(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for name in imported(node):
            if any(name == module or name.startswith(f"{module}.") for module in MODULES):
                found.add(f"import {next(m for m in MODULES if name == m or name.startswith(f'{m}.'))}")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        # By its whole name: re.compile and model.eval() are others.
        if name in CALLS or name.rpartition(".")[2] in METHODS or name.startswith("builtins."):
            found.add(f"call of {name}")
        if name.rpartition(".")[2] == "import_module" and not (
            node.args and isinstance(node.args[0], ast.Constant)
        ):
            found.add("import_module of a name")
        for keyword in node.keywords:
            if keyword.arg in KEYWORDS and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is KEYWORDS[keyword.arg]
            ):
                found.add(f"{keyword.arg}= in a call")
    return found


def test_sources_are_found() -> None:
    assert len(SOURCES) > 150


def test_nothing_makes_code_or_objects_of_data() -> None:
    found = {
        (str(path.relative_to(ROOT)), what): ""
        for path in SOURCES
        for what in findings(path.read_text())
        # A context's own check of certificates, pydantic's and others' arguments of these names are none.
        if what != "verify= in a call"
    }
    assert found.keys() == EXCEPTIONS.keys()


def test_the_pickles_converter_is_imported_by_its_command_only() -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if any("pickled_sidecars" in name for name in imported(node))
    }
    assert importers == {"ckpt_engine/cli/convert_metadata.py"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as f",
        "import multiprocessing.connection as c",
        "from torch import package",
        "from multiprocessing import connection",
        "def f():\n    import dill",
        "eval(x)",
        "exec(x)",
        "torch.load(x)",
        "socket.recv_pyobj()",
        "np.load(x, allow_pickle=True)",
        "np.lib.format.read_array(f, allow_pickle=flag)",
        "subprocess.run(x, shell=True)",
        "importlib.import_module(name)",
        "import_module(name)",
        "torch.distributed.all_gather_object(a, b)",
        "loader.exec_module(m)",
        "__import__(x)",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    ["re.compile(x)", "model.eval()", "import_module('torch_npu')", "json.loads(x)", "f(shell=False)"],
)
def test_what_is_harmless_is_not(source: str) -> None:
    assert not findings(source)
