"""Real vLLM on CPU. Run by `make test-vllm`, in its own environment; elsewhere nothing here is collected."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LONGEST_FIRST = (
    "server",
    "update_example",
    "ray",
    "examples",
    "two_workers",
    "quantised",
    "drafter",
    "tying",
)
"""So that none is left to one of several processes alone at the end."""
SHARING = {"test_server": True, "test_offline": True, "test_tying": False, "test_update_example": False}
"""Modules whose tests share engines that a fixture starts: one for each of its parameters, or one in all."""
SHARED_MEMORY = "/dev/shm"
OTHERS = ("psm_", "sem.", "torch_", "__KMP", "vllm_dist_", "sgl", "fake-npu")
"""Names there of what vLLM (and SGLang) make, Python's shared memory, torch, OpenMP, and of other tests."""
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

if importlib.util.find_spec("vllm"):
    from tests.engines.vllm.engines import RUNTIME, Checkpoints, OfflineEngine

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker("vllm")
        items.sort(key=_place)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # noqa: ANN401 - xdist's
        """What shares an engine stays in one of several processes, in its order."""
        from xdist.scheduler import LoadScopeScheduling

        class ByEngine(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                file, _, test = nodeid.partition("::")
                module = Path(file).stem
                if module not in SHARING:
                    return nodeid
                return f"{module} {re.split(r'[][-]', test)[1]}" if SHARING[module] else module

        return ByEngine(config, log)

    def _place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    @pytest.fixture(scope="session")
    def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
        return Checkpoints(tmp_path_factory.mktemp("checkpoints"))

    @pytest.fixture(scope="session")
    def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineEngine]:
        """vLLM in one process, for one model after the other."""
        engine = OfflineEngine(tmp_path_factory.mktemp("offline") / "log.txt")
        yield engine
        engine.close()

    @pytest.fixture(scope="module", autouse=True)
    def nothing_left() -> Iterator[None]:
        """After a module, and what it killed: no socket, and no shared memory but that of engines."""
        before = set(os.listdir(SHARED_MEMORY))
        yield
        assert list(RUNTIME.iterdir()) == []
        left = set(os.listdir(SHARED_MEMORY)) - before
        left = {name for name in left if not name.startswith(OTHERS) and "-cpushm_" not in name}
        assert left == set()

    def pytest_sessionfinish() -> None:
        # Of each process that runs tests, and of the one that has them run.
        shutil.rmtree(RUNTIME, ignore_errors=True)

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        """A row for the README's table of versions."""
        import torch
        import vllm

        kinds = ("passed", "skipped", "failed", "error")
        count = {kind: len(terminalreporter.stats.get(kind, ())) for kind in kinds}
        result = ", ".join(f"{number} {kind}" for kind, number in count.items() if number)
        terminalreporter.section("vLLM versions")
        terminalreporter.line("| vLLM | PyTorch | Python | result |")
        terminalreporter.line("|---|---|---|---|")
        version = ".".join(map(str, sys.version_info[:3]))
        terminalreporter.line(f"| {vllm.__version__} | {torch.__version__} | {version} | {result} |")
