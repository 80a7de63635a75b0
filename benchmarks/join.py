"""Does a join disturb those who serve? Requests to a live engine before, during and after others join.

    python -m benchmarks.join --joiners 1 --json
    python -m benchmarks.join --joiners 3 --json

One embedded engine has its weights from a parameter server beside it, which stays, and answers requests all
the time, one after the other. Then so many new engines, each with a parameter server of its own, take the
weights from that parameter server's memory by P2P, at the same time, `--rounds` times in a row. A line for
each phase says how long requests took: before, during the joins, after. All run on one machine: what the
joiners compute takes processor time from the engine that serves, as it would not on hosts of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from ckpt_engine.cli.demo import two_free_ports
from ckpt_engine.deadline import Deadline
from ckpt_engine.embedded_engine.model import make_checkpoint
from ckpt_engine.embedded_engine.processes import Child, Children, Signals
from ckpt_engine.metadata import Metas, metas_from_json
from ckpt_engine.parameter_server import ParameterServer
from ckpt_engine.server.engine_client import call_engine, request_inference_to_update, wait_until_healthy
from ckpt_engine.settings import load_settings
from ckpt_engine.update.session import UpdateReport

SECONDS = 300.0
PROMPT = (3, 1, 4, 1, 5)


def wait_for(what: str, result: Callable[[], Any], seconds: float = SECONDS) -> Any:  # noqa: ANN401 - its result
    deadline = Deadline.after(seconds)
    while not (found := result()):
        if deadline.passed:
            raise SystemExit(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)
    return found


class Requests:
    """Asks one engine, one request after the other, until it is closed. `seconds`: of those since `reset`."""

    def __init__(self, endpoint: str, tokens: int) -> None:
        self.seconds: list[float] = []
        self._endpoint = endpoint
        self._tokens = tokens
        self._ended = False
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        request = {"prompt_token_ids": list(PROMPT), "max_tokens": self._tokens}
        with httpx.Client(timeout=SECONDS, trust_env=False) as client:
            while not self._ended:
                began = time.monotonic()
                client.post(f"{self._endpoint}/generate", json=request).raise_for_status()
                self.seconds.append(time.monotonic() - began)

    def phase(self, name: str, joiners: int) -> dict[str, Any]:
        """What was seen since the phase before."""
        taken, self.seconds = self.seconds, []
        ordered = sorted(taken)
        return {
            "benchmark": "join",
            "phase": name,
            "joiners": joiners,
            "requests": len(ordered),
            "median_ms": round(1000 * statistics.median(ordered), 1),
            "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 1),
            "max_ms": round(1000 * ordered[-1], 1),
        }

    def close(self) -> None:
        self._ended = True
        self._thread.join()


def start_engine(children: Children, number: int, checkpoint: Path) -> Child:
    arguments = ["-m", "ckpt_engine.embedded_engine", "--model", str(checkpoint), "--seed", str(number)]
    return children.start(f"engine-{number}", arguments, CKPT_ENGINE_CPU_DEVICES=str(number))


def endpoint_of(engine: Child) -> str:
    announced = wait_for(f"{engine.name} to listen", engine.announcement)
    endpoint = f"http://127.0.0.1:{announced['port']}"
    wait_until_healthy(endpoint, SECONDS)
    return endpoint


def give_weights(children: Children, directory: Path, endpoint: str) -> Metas:
    """A parameter server updates the first engine and stays; its metas."""
    metas, report = directory / "metas.json", directory / "report.json"
    update = ["-m", "ckpt_engine.cli.main", "update", "--checkpoint-path", str(directory / "checkpoint")]
    update += ["--endpoint", endpoint, "--save-metas-file", str(metas), "--report-file", str(report)]
    port = str(two_free_ports())
    children.start("owner", [*update, "--sleep-time", "3600"], CKPT_ENGINE_P2P="on", MASTER_PORT=port)
    wait_for("the first engine's update", report.exists)
    return metas_from_json(metas.read_bytes())


class Joiner:
    """A parameter server of its own beside a new engine, whose device is number `number` of this host."""

    def __init__(self, number: int, endpoint: str, metas: Metas) -> None:
        os.environ["CKPT_ENGINE_DEVICE_UUID"] = f"CPU-{load_settings().host_id}-{number}"
        try:
            self.ps = ParameterServer(rank=0, world_size=1, device="cpu")
        finally:
            del os.environ["CKPT_ENGINE_DEVICE_UUID"]
        self._endpoint = endpoint
        self._name = self.ps.load_metas(metas)

    def join(self) -> UpdateReport:
        report = self.ps.update(
            self._name,
            lambda paths: request_inference_to_update(
                f"{self._endpoint}/collective_rpc", paths, SECONDS - 30
            ),
            ranks=[0],
            timeout=SECONDS,
        )
        assert report.p2p_nbytes == report.nbytes
        return report


def join_all(joiners: list[Joiner], rounds: int) -> list[UpdateReport]:
    """All of them at the same time, so many times."""
    reports: list[UpdateReport] = []
    with ThreadPoolExecutor(len(joiners)) as pool:
        for _ in range(rounds):
            reports += pool.map(Joiner.join, joiners)
    return reports


def measure(directory: Path, children: Children, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    make_checkpoint(directory / "checkpoint", seed=1, size=arguments.size)
    engines = [
        start_engine(children, number, directory / "checkpoint") for number in range(arguments.joiners + 1)
    ]
    first, *others = [endpoint_of(engine) for engine in engines]
    metas = give_weights(children, directory, first)
    expected = call_engine(f"{first}/collective_rpc", "parameter_digests", timeout=SECONDS)
    with ExitStack() as ending:
        joiners = [Joiner(number, endpoint, metas) for number, endpoint in enumerate(others, 1)]
        for joiner in joiners:
            ending.callback(joiner.ps.close)
        join_all(joiners, 1)  # connections, pages and groups are there from here on
        requests = Requests(first, arguments.tokens)
        ending.callback(requests.close)
        time.sleep(1)
        requests.phase("warm", 0)
        time.sleep(arguments.seconds)
        yield requests.phase("before", 0)
        reports = join_all(joiners, arguments.rounds)
        yield requests.phase("during", arguments.joiners) | {
            "joins": len(reports),
            "join_median_s": round(statistics.median(report.seconds for report in reports), 3),
            "bytes": reports[0].nbytes,
        }
        time.sleep(arguments.seconds)
        yield requests.phase("after", 0)
    for endpoint in others:
        assert call_engine(f"{endpoint}/collective_rpc", "parameter_digests", timeout=SECONDS) == expected


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--joiners", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", choices=("tiny", "small"), default="small")
    parser.add_argument("--tokens", type=int, default=4, help="that a request asks for")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the phases before and after")
    parser.add_argument("--json", action="store_true", help="(always: JSON lines)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Signals() as signals:
        children = Children(Path(directory), signals)
        try:
            with signals.raising():
                for line in measure(Path(directory), children, arguments):
                    print(json.dumps(line), flush=True)
        finally:
            children.end()


if __name__ == "__main__":
    main()
