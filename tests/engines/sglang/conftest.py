"""Real SGLang on CPU. Run by `make test-sglang`, in its own environment; elsewhere nothing here is collected.

A server takes most of a minute to start, so that tests share them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_*.py"]

if importlib.util.find_spec("sglang"):
    from tests.engines.sglang.servers import WAIT, Checkpoints, Server

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker("sglang")
        # A server has its first weights once: what looks at them comes before all that shares the server.
        items.sort(key=lambda item: item.path.is_relative_to(HERE) and "TestFirstWeights" not in item.nodeid)

    @pytest.fixture(scope="session", autouse=True)
    def a_host_of_our_own() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in [each for each in os.environ if each.startswith(("CKPT_ENGINE_", "SGLANG_"))]:
                patch.delenv(name)
            patch.setenv("CKPT_ENGINE_HOST_ID", "here")
            yield

    @pytest.fixture(scope="session")
    def sglang_in_process() -> Iterator[None]:
        """SGLang in the tests' own process, on CPU."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
            patch.syspath_prepend(HERE / "stubs")
            importlib.import_module("sglang.srt.managers.scheduler_components.weight_updater")
            yield

    @pytest.fixture(scope="session")
    def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
        return Checkpoints(tmp_path_factory.mktemp("checkpoints"))

    @pytest.fixture(scope="session")
    def log(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
        directory = tmp_path_factory.mktemp("logs")
        return lambda name: directory / f"{name}.log"

    @pytest.fixture(scope="session")
    def pair(checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[tuple[Server, Server]]:
        """A server that waits for its first weights, guarded, so that SGLang's time-out does not count; and
        one that has loaded them from disk, on another host as far as the parameter servers can tell."""
        model = checkpoints("llama", 1)
        waiting = Server(
            model, log("waiting"), WAIT, SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="1", CKPT_ENGINE_GUARD="true"
        )
        from_disk = Server(model, log("disk"), dummy=False, host="there")
        try:
            yield waiting.wait(), from_disk.wait("/health")
        finally:
            waiting.close()
            from_disk.close()

    @pytest.fixture
    def server(pair: tuple[Server, Server]) -> Iterator[Server]:
        """The one that waits, or waited, for its first weights; without faults."""
        pair[0].fail()
        yield pair[0]
        pair[0].fail()

    @pytest.fixture
    def disk_server(pair: tuple[Server, Server]) -> Server:
        return pair[1]
