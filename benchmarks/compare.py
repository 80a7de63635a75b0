"""The reference, checkpoint-engine as PyPI has it, and ours, with the same weights, in turn; on one GPU.

    python -m benchmarks.compare --gib 16 --rounds 5 --json

The reference is installed apart from this environment, unmodified (`--reference` takes wheels in place of
the version, where there is no package index). Both stand ready at the same time, each a rank and a worker
in processes of their own. A JSON line for each turn, and one with the medians of each work:
`limit_seconds` is the copy of as many bytes from pinned memory to the device in this run, and `ratio` the
limit's time by a system's; `times` says how many times as long the reference took. `peak_device_bytes`:
what was taken on the device during an update, beside what was taken before.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.fleet import shapes_of, share_of

ROOT = Path(__file__).parents[1]
REFERENCE = ("checkpoint-engine==0.4.2", "loguru")
"""What it needs beside what we need as well."""
SYSTEMS = ("ours", "reference")
PIECE_NBYTES = 256 * 1024 * 1024
SHARD_TENSORS = 16


class Contender:
    """A process of `benchmarks.contender`."""

    def __init__(self, name: str, arguments: argparse.Namespace, files: Path, packages: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        paths = [str(ROOT), str(packages) if name == "reference" else "", os.environ.get("PYTHONPATH", "")]
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "CKPT_ENGINE_SOCKET_DIR": str(packages.parent / "sockets"),
        }
        command = [sys.executable, "-m", "benchmarks.contender", name, "--files", str(files)]
        command += ["--gib", str(arguments.gib), "--tensor-mib", str(arguments.tensor_mib)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = name
        assert self.hear() == "ready"

    def hear(self) -> Any:  # noqa: ANN401
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}")
        return json.loads(line)

    def do(self, work: str) -> float:
        """Its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        return float(self.hear())

    def close(self) -> None:
        """Lets it end; a system that does not is ended."""
        try:
            self._process.communicate(timeout=60)  # closes its stdin
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def install(reference: tuple[str, ...], packages: Path) -> None:
    command = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*command, *reference], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the reference cannot be installed:\n{done.stderr}")


def write_files(arguments: argparse.Namespace, directory: Path) -> None:
    tensors = share_of(shapes_of(int(arguments.gib * 2**30), arguments.tensor_mib), 0, 1)
    names = list(tensors)
    for start in range(0, len(names), SHARD_TENSORS):
        shard = {name: tensors[name] for name in names[start : start + SHARD_TENSORS]}
        file = directory / f"model-{start:05}.safetensors"
        save_file(shard, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())  # else the disk is at work during the first rounds


def limit_seconds(nbytes: int) -> float:
    """Of copies from pinned memory to the device."""
    source = torch.empty(PIECE_NBYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PIECE_NBYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for start in range(0, nbytes, PIECE_NBYTES):
        part = min(PIECE_NBYTES, nbytes - start)
        target[:part].copy_(source[:part], non_blocking=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    del source, target
    torch.cuda.empty_cache()
    return seconds


@contextmanager
def watching_memory() -> Iterator[list[int]]:
    """Fills in the most device memory that was taken meanwhile, beside what was before."""
    before = lowest = torch.cuda.mem_get_info(0)[0]
    over = threading.Event()

    def watch() -> None:
        nonlocal lowest
        while not over.wait(0.001):
            lowest = min(lowest, torch.cuda.mem_get_info(0)[0])

    thread = threading.Thread(target=watch)
    thread.start()
    found: list[int] = []
    yield found
    over.set()
    thread.join()
    found.append(before - lowest)


def registrations(systems: list[Contender], work: str, rounds: int) -> Iterator[dict[str, Any]]:
    for number in range(rounds):
        for system in systems:
            seconds = system.do(work)
            yield {"work": work, "system": system.name, "round": number, "seconds": round(seconds, 5)}
            system.do("unregister")


def updates(systems: list[Contender], nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    for system in systems:
        system.do("register_tensors")
        system.do("forget")
    for number in range(-1, rounds):
        for system in systems:
            limit = limit_seconds(nbytes)
            gather = system.do("gather")
            with watching_memory() as taken:
                seconds = system.do("update")
            line = {"work": "update", "system": system.name, "round": number, "seconds": round(seconds, 5)}
            if number >= 0:  # the first one is cold
                yield line | {
                    "gather_seconds": round(gather, 5),
                    "limit_seconds": round(limit, 5),
                    "peak_device_bytes": taken[0],
                }


def summary(lines: list[dict[str, Any]], nbytes: int) -> Iterator[dict[str, Any]]:
    for work in dict.fromkeys(line["work"] for line in lines):
        by_system = {
            system: [line for line in lines if (line["work"], line["system"]) == (work, system)]
            for system in SYSTEMS
        }
        median = {
            system: statistics.median(line["seconds"] for line in of_system)
            for system, of_system in by_system.items()
        }
        figures: dict[str, Any] = {"work": work, "bytes": nbytes, "median_of": len(by_system["ours"])}
        for system, of_system in by_system.items():
            figures[system] = {
                "seconds": median[system],
                "seconds_min": min(line["seconds"] for line in of_system),
                "seconds_max": max(line["seconds"] for line in of_system),
                "gb_per_second": round(nbytes / median[system] / 1e9, 2),
            }
            if work == "update":
                limit = statistics.median(line["limit_seconds"] for line in of_system)
                figures[system] |= {
                    "limit_seconds": limit,
                    "ratio": round(limit / median[system], 3),
                    "peak_device_bytes": max(line["peak_device_bytes"] for line in of_system),
                }
        yield figures | {"times": round(median["reference"] / median["ours"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=16.0)
    parser.add_argument("--tensor-mib", type=float, default=64.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", nargs="+", default=REFERENCE, help="requirements, or wheels")
    parser.add_argument(
        "--work",
        nargs="+",
        choices=("register_files", "register_tensors", "update"),
        default=["register_files", "register_tensors", "update"],
    )
    parser.add_argument("--json", action="store_true", help="only JSON lines (they are printed anyway)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the reference runs on a CUDA device only, and none is here")
    nbytes = sum(
        2 * rows * columns
        for rows, columns in shapes_of(int(arguments.gib * 2**30), arguments.tensor_mib).values()
    )
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as ending:
        packages, files = Path(directory, "packages"), Path(directory, "files")
        files.mkdir()
        install(tuple(arguments.reference), packages)
        if "register_files" in arguments.work:
            write_files(arguments, files)
        systems = []
        for name in SYSTEMS:
            systems.append(Contender(name, arguments, files, packages))
            ending.callback(systems[-1].close)
        for work in arguments.work:
            found = (
                updates(systems, nbytes, arguments.rounds)
                if work == "update"
                else registrations(systems, work, arguments.rounds)
            )
            for line in found:
                lines.append(line)
                print(json.dumps({"benchmark": "compare"} | line), flush=True)
    for figures in summary(lines, nbytes):
        print(json.dumps({"benchmark": "compare"} | figures))


if __name__ == "__main__":
    main()
