"""Ranks and workers that a test steers: each a process of its own, told what to do by JSON lines.

No launcher stands between them and the test: when one dies, the others live on, as far as the product lets
them. What a process says is read by a thread, with the time at which it happened on the clock that all
processes of a host share.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.fleet import process_figures
from tests.integration.conftest import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 150.0
"""For anything that is no fault: a loaded machine may take long."""
SHORT_DEADLINES = {
    "CKPT_ENGINE_STALL_TIMEOUT": "3",
    "CKPT_ENGINE_REPLY_TIMEOUT": "4",
    "CKPT_ENGINE_HANDSHAKE_TIMEOUT": "6",
}

Answer = dict[str, Any]


class Memory(NamedTuple):
    """Of one process, in bytes."""

    resident: int
    locked: int


class Steered:
    """One process. `module` reads JSON lines from stdin and writes JSON lines to stdout.

    A line with "event" is news; any other one is the answer to what it was told. `log`: its stderr.
    """

    def __init__(
        self,
        name: str,
        module: str,
        environment: dict[str, str],
        log: Path,
        *arguments: str,
        prefix: Sequence[str] = (),
    ) -> None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.name = name
        self._log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=env | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.pid = self.process.pid
        self.news: dict[str, float] = {}
        self._answers: queue.Queue[Answer | None] = queue.Queue()
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, name=f"reads {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            with self._heard:
                if "event" in said:
                    self.news[said["event"]] = said["at"]
                else:
                    self._answers.put(said)
                self._heard.notify_all()
        self._answers.put(None)
        with self._heard:
            self._heard.notify_all()

    def tell(self, do: str, **arguments: object) -> None:
        self.news.clear()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = START_SECONDS) -> Answer:
        """What it says next; fails the test when that does not come, or it ended instead."""
        try:
            said = self._answers.get(timeout=seconds)
        except queue.Empty:
            pytest.fail(f"{self.name} (pid {self.pid}) said nothing within {seconds} s\n{self.log()}")
        if said is None:
            pytest.fail(f"{self.name} ended with {self.process.wait(seconds)}\n{self.log()}")
        return said

    def ask(self, do: str, **arguments: object) -> Answer:
        self.tell(do, **arguments)
        return self.answer()

    def happened(self, event: str, seconds: float = START_SECONDS) -> float:
        """When it said that `event` happened; waits for it."""
        with self._heard:
            if not self._heard.wait_for(lambda: event in self.news, seconds):
                pytest.fail(f"{self.name} did not say {event!r} within {seconds} s\n{self.log()}")
            return self.news[event]

    def log(self) -> str:
        return f"--- stderr of {self.name} ---\n{self._log.read_text(errors='replace')[-4000:]}"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} (pid {self.pid}) did not end within {seconds} s\n{self.log()}")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Kills it, if need be, and takes back all that belongs to it."""
        if self.alive:
            self.process.kill()
        self.process.wait(START_SECONDS)
        self._reader.join(START_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    # What the kernel knows of it

    def rings(self) -> list[str]:
        """Its maps of rings, which are memfds, and its descriptors of them: its own, and other processes'."""
        lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return [line for line in [*lines, *self.descriptors()] if "ckpt-engine-ring" in line]

    def descriptors(self) -> list[str]:
        """Where its descriptors lead."""
        directory = f"/proc/{self.pid}/fd"
        links = []
        for fd in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"{directory}/{fd}"))
        return links

    def memory(self) -> Memory:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
        return Memory(resident=kib["VmRSS"] * 1024, locked=kib["VmLck"] * 1024)

    def figures(self) -> dict[str, int]:
        """What it holds, as `benchmarks.fleet.process_figures` has it of a process itself."""
        return process_figures(self.pid)

    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.pid}/task")
        return [int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()]


class SteeredWorker(Steered):
    """An engine's worker, which is asked to receive over a Unix socket of its own."""

    def __init__(self, host: int, index: int, directory: Path, prefix: Sequence[str]) -> None:
        self.socket_path = directory / f"engine-{host}-{index}"
        environment = SHORT_DEADLINES | {
            "CKPT_ENGINE_HOST_ID": f"host{host}",
            "CKPT_ENGINE_CPU_DEVICES": str(index),
        }
        super().__init__(
            f"the worker of CPU-host{host}-{index}",
            "tests.support.steered_worker",
            environment,
            directory / f"worker-{host}-{index}.log",
            str(self.socket_path),
            prefix=prefix,
        )
        self._ready = False

    def ready(self) -> SteeredWorker:
        """Once it listens."""
        if not self._ready:
            self.answer()
            self._ready = True
        return self


def nothing(host: int) -> Sequence[str]:
    """Seeming hosts: all of them are this one."""
    return ()


class Engines:
    """The workers of engines. They outlive the fleets of ranks; one that died is replaced when asked for.

    `prefix`: what runs a command on a host.
    """

    def __init__(self, directory: Path, prefix: Callable[[int], Sequence[str]] = nothing) -> None:
        self.prefix = prefix
        self._directory = directory
        self._there: dict[tuple[int, int], SteeredWorker] = {}

    def worker(self, host: int, index: int) -> SteeredWorker:
        found = self._there.get((host, index))
        if found is None or not found.alive:
            if found is not None:
                found.end()
            found = self._there[host, index] = SteeredWorker(host, index, self._directory, self.prefix(host))
        return found

    def end(self) -> None:
        """All of them: who is asked for afterwards is a new one."""
        for worker in self._there.values():
            worker.end()
        self._there.clear()


class Fleet:
    """The ranks of one launch, on as many seeming hosts, beside the workers of `engines`.

    `like`: a fleet before, at whose ports and in whose directories this one takes its place. `p2p`: whether
    they can be read by P2P; else owners must take part. `first_host`: where the hosts' numbers begin;
    `on_host`: what the environment of a host's ranks has beside that of all.
    """

    def __init__(
        self,
        size: int,
        hosts: int,
        directory: Path,
        engines: Engines,
        like: Fleet | None = None,
        *,
        p2p: bool = False,
        first_host: int = 0,
        on_host: Callable[[int], Mapping[str, str]] = lambda host: {},
        **environment: str,
    ) -> None:
        self.size = size
        self.hosts = hosts
        self.engines = engines
        self.directory: Path = like.directory if like else directory
        self.master_port: int = like.master_port if like else free_port()
        # A socket's path may have 107 bytes: temporary directories of tests are too deep.
        self.socket_dir = Path(tempfile.gettempdir()) / f"ce-{os.getpid()}-{self.master_port}"
        local = size // hosts
        self._place = [(first_host + rank // local, rank % local) for rank in range(size)]
        workers = [engines.worker(*place) for place in self._place]  # they start side by side with the ranks
        common = SHORT_DEADLINES | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.master_port),
            "CKPT_ENGINE_SOCKET_DIR": str(self.socket_dir),
            "CKPT_ENGINE_SLOT_MIB": "0.25",
            "CKPT_ENGINE_P2P": "on" if p2p else "off",
            **environment,
        }
        self.ranks = [
            Steered(
                f"rank {rank}",
                "tests.support.steered_rank",
                common | {"RANK": str(rank), "CKPT_ENGINE_HOST_ID": f"host{host}"} | dict(on_host(host)),
                self.directory / f"rank-{rank}.log",
                str(workers[rank].socket_path),
                prefix=engines.prefix(host),
            )
            for rank, (host, _) in enumerate(self._place)
        ]

    def worker(self, rank: int) -> SteeredWorker:
        """The one that is there now: a new one in place of one that has ended."""
        return self.engines.worker(*self._place[rank]).ready()

    def device(self, rank: int) -> str:
        host, index = self._place[rank]
        return f"CPU-host{host}-{index}"

    def tell(self, do: str, on: Sequence[int], **arguments: Any) -> None:  # noqa: ANN401
        """Arguments that are callable are called with the rank."""
        for rank in on:
            given = {key: value(rank) if callable(value) else value for key, value in arguments.items()}
            self.ranks[rank].tell(do, **given)

    def answers(self, on: Sequence[int], seconds: float = START_SECONDS) -> dict[int, Answer]:
        deadline = time.monotonic() + seconds
        return {rank: self.ranks[rank].answer(max(0.1, deadline - time.monotonic())) for rank in on}

    def ask(self, do: str, on: Sequence[int], **arguments: Any) -> dict[int, Answer]:  # noqa: ANN401
        self.tell(do, on, **arguments)
        return self.answers(on)

    def end_ranks(self) -> None:
        """Kills who is left."""
        for rank in self.ranks:
            rank.end()

    def end(self) -> None:
        """Removes what killed ranks could not, too."""
        self.end_ranks()
        shutil.rmtree(self.socket_dir, ignore_errors=True)
