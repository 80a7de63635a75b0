"""How fast weights are read by P2P, beside what mooncake itself can do in the same run.

    python -m benchmarks.p2p --gib 1 --receivers 1,2,4 --piece-mib 4,16,64 --json

So many owners, each a parameter server with its share, and as many receivers, each a process that reads its
part of the plan as an update does: with leases, into its staging buffer, in buckets of `--piece-mib`. One
JSON line for each number of receivers and size of bucket. `limit_gb_per_second`: the same receivers read the
same bytes with nothing but mooncake's own calls, into the same staging memory, in pieces of the best of the
sizes, as many at a time as is best. Both go in turn, `--rounds` times; medians. `ratio` = ours / limit.
`cpu_seconds` and `limit_cpu_seconds`: what owners and receivers together took of the processors, which are
the limit where all hosts are one machine. With `--join` a line more for each number of receivers: whole
updates, in which every rank has a worker that copies each tensor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.fleet import Worker, parameter_server, shapes_of, share_of
from ckpt_engine.cli.demo import two_free_ports
from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import make_device
from ckpt_engine.metadata import Metas, metas_from_json, metas_to_json, topology
from ckpt_engine.planning.plan import PlannedBucket, make_plan
from ckpt_engine.planning.reads import choose_receivers, staging_shape
from ckpt_engine.planning.sources import Sources
from ckpt_engine.settings import load_settings
from ckpt_engine.timeline.recorder import NO_RECORDER
from ckpt_engine.transport.leases import Lease, Share
from ckpt_engine.update.p2p_ends import P2PEnds
from ckpt_engine.update.p2p_reader import P2PReader

MiB = 1024 * 1024
NAME = "benchmark"
DEPTHS = (4, 8)
"""How many pieces raw reads have under way; the best counts."""
RAW_POLL_SECONDS = 0.0005

Span = tuple[float, float]
"""From when to when, on the clock that all processes of a host share."""


class Cost(NamedTuple):
    """`seconds`: from the first one's begin to the last one's end. `cpu`: seconds of processors, of all."""

    seconds: float
    cpu: float


def median(costs: Sequence[Cost]) -> Cost:
    """Of each."""
    return Cost(statistics.median(one.seconds for one in costs), statistics.median(one.cpu for one in costs))


_SPAWN = multiprocessing.get_context("spawn")


def own(rank: int, ranks: int, nbytes: int, port: int, pipe: Connection) -> None:
    """An owner: tells its fleet's metas, then its CPU seconds when asked, until it is told to go."""
    os.environ |= {"CKPT_ENGINE_HOST_ID": f"owner-{rank}", "CKPT_ENGINE_P2P": "on"}
    torch.set_num_threads(1)
    with parameter_server(rank, ranks, "cpu", port) as ps:
        ps.register_checkpoint(NAME, named_tensors=share_of(shapes_of(nbytes, 4), rank, ranks))
        ps.gather_metas(NAME)
        pipe.send(metas_to_json(ps.get_metas()))
        while pipe.recv():
            pipe.send(time.process_time())


def receive(rank: int, ranks: int, metas: Metas, port: int, pipe: Connection) -> None:
    """A receiver: does what it is told, and says from when to when, and how many CPU seconds that took."""
    os.environ |= {"CKPT_ENGINE_HOST_ID": f"receiver-{rank}", "CKPT_ENGINE_P2P": "on"}
    torch.set_num_threads(1)
    with ExitStack() as ending:
        receiver = Receiver(rank, ranks, metas, port, ending)
        pipe.send("ready")
        while (told := pipe.recv()) is not None:
            do, arguments = told
            before = time.process_time()
            done = getattr(receiver, do)(*arguments)
            pipe.send((done, time.process_time() - before))


class Receiver:
    def __init__(self, rank: int, ranks: int, metas: Metas, port: int, ending: ExitStack) -> None:
        self._rank, self._ranks, self._metas, self._port = rank, ranks, metas, port
        self._sources = Sources.of_fleets([metas])
        device = make_device("cpu", load_settings(), 0)
        ends = P2PEnds(load_settings(), device, gpu_count=1, local_rank=0, host_ip="127.0.0.1")
        ending.callback(ends.close)
        self._reading = ends.reading
        self._ending = ending
        self._join: Callable[[], Span] | None = None

    def _items(self, piece_nbytes: int) -> tuple[PlannedBucket, ...]:
        """What this receiver reads, by the plan of an update in buckets of that size."""
        local = {f"tcp@receiver-{rank}": {rank} for rank in range(self._ranks)}
        remote = topology(self._sources.planned)
        plan = make_plan(
            NAME,
            {},
            slot_nbytes=piece_nbytes,
            slot_count=3,
            budget=1 << 40,
            outside=self._sources.planned,
            assign=lambda buckets: choose_receivers(buckets, local, remote).assigned,
        )
        return plan.read_by(self._rank)

    def transport(self) -> str:
        return self._reading.store().transport

    def ours(self, piece_nbytes: int) -> Span:
        """The reads of an update, whose buckets are let go as they come."""
        items = self._items(piece_nbytes)
        nbytes, count = staging_shape(items)
        token = f"receiver {self._rank}"
        begin = time.monotonic()
        reader = P2PReader(
            items,
            self._sources,
            self._reading,
            lambda held, _: Lease.take(Share.of(held), Deadline.after(60), reader=token),
            landing=lambda: self._reading.staging(nbytes, count),
            read_timeout=120,
            recorder=NO_RECORDER,
        )
        try:
            for item in items:
                while reader.view(item) is None:
                    select.select([reader], [], [], 60)
                    reader.check()
                reader.let_go(item)
            end = time.monotonic()
        finally:
            reader.close()
        return begin, end

    def raw(self, piece_nbytes: int, depth: int) -> Span:
        """The same bytes by mooncake's own calls, `depth` pieces at a time."""
        pieces = [
            (held.p2p_address, extent.address + start, min(piece_nbytes, extent.nbytes - start))
            for item in self._items(64 * MiB)
            for source, extents in self._sources.reads_of(item.bucket).items()
            for held in [self._sources.by_number[source]]
            for extent in extents
            for start in range(0, extent.nbytes, piece_nbytes)
        ]
        depth = min(depth, len(pieces))
        places = self._reading.staging(piece_nbytes, depth)
        engine: Any = self._reading.store()._engine  # type: ignore[attr-defined]
        free = [places.arena.address + number * places.place_nbytes for number in range(depth)]
        todo, under_way = iter(pieces), {}
        begin = time.monotonic()
        left = len(pieces)
        while left:
            while free and (piece := next(todo, None)) is not None:
                place = free.pop()
                peer, address, nbytes = piece
                number = engine.batch_transfer_async_read(peer, [place], [address], [nbytes])
                assert number
                under_way[number] = place
            ended = [number for number in under_way if engine.transfer_check_status(number)]
            free += [under_way.pop(number) for number in ended]
            left -= len(ended)
            if not ended:
                time.sleep(RAW_POLL_SECONDS)
        return begin, time.monotonic()

    def join(self, slot_mib: float) -> Span:
        """A whole update, with a worker."""
        if self._join is None:
            os.environ["CKPT_ENGINE_SLOT_MIB"] = str(slot_mib)
            nbytes = sum(held.nbytes for held in self._metas.values())
            worker = Worker("cpu", self._rank, shapes_of(nbytes, 4))
            self._ending.callback(worker.close)
            ps = self._ending.enter_context(parameter_server(self._rank, self._ranks, "cpu", self._port))
            worker.wait_until_ready()
            name = ps.load_metas(self._metas)

            def run() -> Span:
                begin = time.monotonic()
                ps.update(name, worker.update, ranks=range(self._ranks), timeout=600)
                return begin, time.monotonic()

            self._join = run
        return self._join()


class Team:
    """Processes that do the same at the same time."""

    def __init__(self, target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
        self.pipes: list[Connection] = []
        self._processes = []
        for given in arguments:
            here, there = _SPAWN.Pipe()
            process = _SPAWN.Process(target=target, args=(*given, there))
            process.start()
            there.close()
            self.pipes.append(here)
            self._processes.append(process)

    def heard(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            sys.exit("a process of the benchmark failed; what it said is above")

    def ask(self, question: object) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(question)
        return self.heard()

    def cost(self, owners: Team, do: str, *arguments: Any) -> Cost:  # noqa: ANN401
        before = sum(owners.ask(True))
        answers = self.ask((do, arguments))
        spans = [span for span, _ in answers]
        cpu = sum(seconds for _, seconds in answers) + sum(owners.ask(True)) - before
        return Cost(max(end for _, end in spans) - min(begin for begin, _ in spans), cpu)

    def close(self) -> None:
        for pipe in self.pipes:
            with suppress(OSError):  # one that died has ended already, and the others are to end all the same
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join()


def measure(receivers: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    nbytes = int(arguments.gib * 2**30)
    port, other_port = two_free_ports(), two_free_ports()
    with ExitStack() as ending:
        owners = Team(own, [(rank, receivers, nbytes, port) for rank in range(receivers)])
        ending.callback(owners.close)
        metas = metas_from_json(owners.heard()[0])
        total = sum(held.nbytes for held in metas.values())
        team = Team(receive, [(rank, receivers, metas, other_port) for rank in range(receivers)])
        ending.callback(team.close)
        team.heard()
        ((transport, _), *_) = team.ask(("transport", ()))
        common = {"benchmark": "p2p", "receivers": receivers, "bytes": total, "transport": transport}
        sizes = [float(size) for size in arguments.piece_mib.split(",")]
        ours: dict[float, list[Cost]] = {size: [] for size in sizes}
        raw: dict[tuple[float, int], list[Cost]] = {(size, depth): [] for size in sizes for depth in DEPTHS}
        for number in range(arguments.rounds + 1):
            for size in sizes:
                taken = team.cost(owners, "ours", int(size * MiB))
                rivals = {depth: team.cost(owners, "raw", int(size * MiB), depth) for depth in DEPTHS}
                if number:  # the first round is cold
                    ours[size].append(taken)
                    for depth, rival in rivals.items():
                        raw[size, depth].append(rival)
        limits = {shape: median(costs) for shape, costs in raw.items()}
        best, depth = min(limits, key=lambda shape: limits[shape].seconds)
        limit = limits[best, depth]
        for size in sizes:
            yield (
                common
                | {"what": "reads", "piece_mib": size}
                | figures(total, ours[size], limit)
                | {
                    "limit_piece_mib": best,
                    "limit_depth": depth,
                    "raw_gb_per_second": {
                        str(one): round(total / limits[size, one].seconds / 1e9, 3) for one in DEPTHS
                    },
                }
            )
        if arguments.join:
            team.cost(owners, "join", 16.0)
            joins = [team.cost(owners, "join", 16.0) for _ in range(arguments.rounds)]
            yield common | {"what": "join", "piece_mib": 16.0} | figures(total, joins, limit)


def figures(nbytes: int, taken: Sequence[Cost], limit: Cost) -> dict[str, Any]:
    middle = median(taken)
    return {
        "seconds": round(middle.seconds, 4),
        "seconds_from_to": [round(min(taken).seconds, 4), round(max(taken).seconds, 4)],
        "gb_per_second": round(nbytes / middle.seconds / 1e9, 3),
        "limit_gb_per_second": round(nbytes / limit.seconds / 1e9, 3),
        "ratio": round(limit.seconds / middle.seconds, 3),
        "cpu_seconds": round(middle.cpu, 3),
        "limit_cpu_seconds": round(limit.cpu, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of the checkpoint")
    parser.add_argument("--receivers", default="1,2,4", help="numbers of receivers, and of owners")
    parser.add_argument("--piece-mib", default="4,16,64", help="MiB of a bucket, several sizes")
    parser.add_argument("--rounds", type=int, default=5, help="after the first, cold one")
    parser.add_argument("--join", action="store_true", help="also whole updates")
    parser.add_argument("--json", action="store_true", help="(always: JSON lines)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {"CKPT_ENGINE_SOCKET_DIR": f"{directory}/s", "GLOO_SOCKET_IFNAME": "lo"}
        for receivers in map(int, arguments.receivers.split(",")):
            for line in measure(receivers, arguments):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
