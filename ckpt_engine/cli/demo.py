"""`ckpt-engine demo`: two real engines with dummy weights, one real update, every byte checked.

All of it runs as separate processes on this machine: two embedded engines, and torchrun with two
parameter servers that read the checkpoint from disk. Needs the `demo` extra.

stderr shows progress; the last line on stdout is JSON: `{"verified": true, ...}` or
`{"verified": false, "error": ...}`.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ckpt_engine.deadline import Deadline
from ckpt_engine.embedded_engine.processes import Child, Children, Interrupted, Signals
from ckpt_engine.errors import CkptEngineError
from ckpt_engine.server.engine_client import call_engine, wait_until_healthy

CHECKPOINT_SEED = 20_260
DUMMY_SEEDS = (1, 2)
"""One per engine: engines that started alike could hide that only one was updated."""
PROMPT = (1, 17, 42, 7)
MAX_TOKENS = 24
STEPS = 6
_LOG_NBYTES = 8 * 1024

T = TypeVar("T")


class DemoFailed(CkptEngineError):
    """A step did not work, or a check did not hold."""


def run_demo(
    *, size: str = "small", keep: bool = False, timeout: float = 300, kind: type[Demo] | None = None
) -> int:
    """Runs a demo and writes its JSON line.

    Args:
        size: of the checkpoint, `small` (56 MB) or `tiny` (0.2 MB).
        kind: with which engine; by default the embedded one.
        keep: leave the directory with the checkpoint and the logs behind.
        timeout: seconds for everything.

    Returns:
        The exit status: 0 verified, 1 not, 128 + signal when interrupted by SIGINT or SIGTERM.
    """
    status = 1
    console = Console(stderr=True, highlight=False)
    with Signals() as signals:
        demo = (kind or EmbeddedDemo)(size, Deadline.after(timeout), console, signals)
        try:
            with signals.raising():
                document = {"verified": True, **demo.run()}
            status = 0
        except Interrupted as interrupt:
            document = {"verified": False, "error": f"interrupted by {signal.Signals(interrupt.signum).name}"}
            status = 128 + interrupt.signum
        except Exception as error:  # noqa: BLE001 - whatever happened, the JSON line says so
            document = {"verified": False, "error": f"{type(error).__name__}: {error}"}
            demo.show_logs()
            if not isinstance(error, CkptEngineError):
                console.print_exception()
        finally:
            demo.close(keep=keep)
    if keep:
        document["directory"] = str(demo.directory)
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
    return status


class Demo:
    """A directory, child processes, and the steps in order, of which `run` is made."""

    def __init__(self, size: str, deadline: Deadline, console: Console, signals: Signals) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="ckpt-engine-demo-"))
        self._checkpoint = self.directory / "checkpoint"
        self._size = size
        self._deadline = deadline
        self._console = console
        self._children = Children(self.directory, signals)
        self._engines: list[Child] = []

    def run(self) -> dict[str, Any]:
        """All steps; what the JSON line says of them. Raises when one fails or a check does not hold."""
        raise NotImplementedError

    def show_logs(self) -> None:
        """The ends of the children's logs, on stderr."""
        for log in sorted(self.directory.glob("*.log")):
            if text := _tail(log):
                self._console.print(f"--- the end of {log.name} ---", style="bold")
                self._console.print(text, markup=False, soft_wrap=True)

    def close(self, *, keep: bool) -> None:
        """Ends every child, then removes the directory."""
        self._children.end()
        if keep:
            self._console.print(f"kept {self.directory}", soft_wrap=True)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _update(self, endpoints: Sequence[str], *options: str) -> dict[str, Any]:
        """`ckpt-engine update` under torchrun, with one parameter server for each engine; its report."""
        report = self.directory / "report.json"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(len(endpoints))]
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(two_free_ports())]
        update = ["-m", "ckpt_engine.cli.main", "update", "--checkpoint-path", str(self._checkpoint)]
        update += [
            "--checkpoint-name",
            "demo",
            "--inference-parallel-size",
            "1",
            "--report-file",
            str(report),
            *options,
        ]
        for endpoint in endpoints:
            update += ["--endpoint", endpoint]
        # One host: its name need not resolve.
        launcher = self._children.start("update", launch + update, GLOO_SOCKET_IFNAME="lo")
        if status := self._wait("the update to end", launcher.process.poll):
            raise DemoFailed(f"the update ended with exit status {status}")
        try:
            document = json.loads(report.read_bytes())
            document["update_seconds"] = float(document["update_seconds"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DemoFailed(f"the update wrote no usable report: {type(error).__name__}: {error}") from None
        return cast("dict[str, Any]", document)

    def _wait(self, what: str, result: Callable[[], T | None]) -> T:
        """Polls until `result()` is not None; fails when an engine ends meanwhile."""
        while (found := result()) is None:
            self._left(what)
            for engine in self._engines:
                if (status := engine.process.poll()) is not None:
                    raise DemoFailed(f"{engine.name} ended with exit status {status}")
            time.sleep(0.05)
        return found

    def _left(self, what: str) -> float:
        if self._deadline.passed:
            raise DemoFailed(f"the demo's timeout passed while it waited for {what}")
        return self._deadline.remaining


class EmbeddedDemo(Demo):
    """Two embedded engines, each with a parameter server."""

    def run(self) -> dict[str, Any]:
        # transformers takes seconds to import, and `ckpt-engine --help` imports this module.
        with Steps(self._console, STEPS) as steps:
            steps.begin("Making a checkpoint")
            from ckpt_engine.embedded_engine import model as models

            models.make_checkpoint(
                self._checkpoint, seed=CHECKPOINT_SEED, size=cast("models.Size", self._size)
            )
            expected, nbytes = models.file_digests(self._checkpoint)
            with _one_thread():
                reference = models.generate_greedily(
                    models.load_from_disk(self._checkpoint), PROMPT, MAX_TOKENS
                )
            steps.done(f"{len(expected)} tensors, {nbytes / 1e6:.1f} MB")

            steps.begin("Starting two engines with dummy weights")
            endpoints = self._start_engines()
            steps.done(", ".join(endpoints))

            steps.begin("Generating with the dummy weights")
            for endpoint in endpoints:
                if self._generate(endpoint) == reference:
                    raise DemoFailed(f"{endpoint} generates as the checkpoint does before it has its weights")
            steps.done("differs from the checkpoint's model")

            steps.begin("Updating both engines from two parameter servers")
            report = self._update(endpoints)
            seconds = float(report["update_seconds"])
            steps.done(f"{seconds:.2f} s")

            steps.begin("Comparing every parameter with the file's bytes")
            for endpoint in endpoints:
                (digests,) = call_engine(
                    f"{endpoint}/collective_rpc", "parameter_digests", timeout=self._left("the digests")
                )
                compare_digests(endpoint, expected, digests)
            steps.done(f"{len(expected)} of {len(expected)} equal in both engines")

            steps.begin("Generating with the new weights")
            for endpoint in endpoints:
                tokens = self._generate(endpoint)
                if tokens != reference:
                    raise DemoFailed(
                        f"{endpoint} generates {tokens}, but the model loaded from disk {reference}"
                    )
            steps.done("equal to the model loaded from disk")
        return {
            "tensors": len(expected),
            "bytes": nbytes,
            "update_seconds": seconds,
            "engines": len(endpoints),
            "generated_tokens": MAX_TOKENS,
            "size": self._size,
        }

    def _start_engines(self) -> list[str]:
        self._engines = [
            self._children.start(
                f"engine-{index}",
                ["-m", "ckpt_engine.embedded_engine", "--model", str(self._checkpoint), "--seed", str(seed)],
                CKPT_ENGINE_CPU_DEVICES=str(index),
            )
            for index, seed in enumerate(DUMMY_SEEDS)
        ]
        endpoints: list[str] = []
        for index, engine in enumerate(self._engines):
            announced = self._wait(f"engine {index} to listen", engine.announcement)
            endpoints.append(f"http://127.0.0.1:{announced['port']}")
        for endpoint in endpoints:
            wait_until_healthy(endpoint, self._left(f"{endpoint} to be healthy"))
        return endpoints

    def _generate(self, endpoint: str) -> list[int]:
        request = {"prompt_token_ids": list(PROMPT), "max_tokens": MAX_TOKENS}
        with httpx.Client(timeout=self._left("a generation"), trust_env=False) as client:
            response = client.post(f"{endpoint}/generate", json=request)
        if not response.is_success:
            raise DemoFailed(f"{endpoint} answered HTTP {response.status_code}: {response.text[:1000]}")
        return cast("list[int]", response.json()["token_ids"])


def compare_digests(endpoint: str, expected: dict[str, str], digests: dict[str, str]) -> None:
    """Raises DemoFailed, naming the first few, when names or bytes differ."""
    problems = [f"{name} is missing" for name in expected.keys() - digests.keys()]
    problems += [f"{name} is not in the files" for name in digests.keys() - expected.keys()]
    problems += [
        f"{name} differs" for name in expected.keys() & digests.keys() if expected[name] != digests[name]
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:5])
        raise DemoFailed(f"{endpoint}: {len(problems)} of {len(expected)} parameters are not right: {shown}")


def two_free_ports() -> int:
    """A free TCP port of 127.0.0.1 whose successor is free too (the store takes MASTER_PORT + 1)."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise DemoFailed("found no two consecutive free ports")


class Steps:
    """A bar on a terminal; elsewhere a line per step."""

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._began = 0.0
        self._what = ""
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=count)

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._progress.update(self._task, description=what)
        if not self._console.is_terminal:
            self._console.print(f"{what} ...", markup=False, soft_wrap=True)

    def done(self, result: str) -> None:
        self._progress.advance(self._task)
        seconds = time.monotonic() - self._began
        indent = "" if self._console.is_terminal else "  "
        what = f"{self._what}: " if self._console.is_terminal else ""
        self._console.print(f"{indent}{what}{result} ({seconds:.1f} s)", markup=False, soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the order of the engines, which compute on one thread: equal weights, equal bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tail(path: Path) -> str:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_NBYTES))
        return file.read().decode("utf-8", "replace").strip()
    return ""
