"""The model of updates beside what was measured: ours, and what the reference has published about itself.

    python -m benchmarks.model
    python -m benchmarks.model --cpu --gib 1 --ranks 2

One JSON line for each case. `measured` and `model` are seconds; `model_is`: "predicted" where the case's time
did not go into the model, "fitted" where it did. Ours is `ckpt-engine plan --cluster` on a file in
examples/clusters. The reference has another pipeline, which is written down here: buckets of gigabytes in
rounds, all copies of a round before its broadcasts, one broadcast beside the reload of the bucket before,
ranks in step after each.

With --cpu it runs updates here, and predicts the stage of buckets of each from a memcpy that was timed just
before it, and from how much more all processes of an update copy at once than one alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from benchmarks.fleet import run_ranks
from benchmarks.update import serve
from ckpt_engine.planning.cluster import Cluster, Synthetic, load_cluster, synthetic_metas
from ckpt_engine.planning.fluid import Delay, Process, Simulation
from ckpt_engine.planning.plan import make_plan
from ckpt_engine.planning.prediction import predict
from ckpt_engine.settings import DEFAULT_SLOT_MIB, MiB

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"
GiB = 2**30


@dataclass(frozen=True)
class Ours:
    """A row of docs/performance.md."""

    what: str
    ranks: int
    gib: float
    measured: float
    fitted: bool = False


OURS = (
    Ours("16 GiB, 1 x H100", 1, 16, 0.325),
    Ours("40 GiB, 1 x H100", 1, 40, 0.828),
    Ours("16 GiB, 2 x H100", 2, 16, 0.192),
    Ours("16 GiB, 4 x H100", 4, 16, 0.139, fitted=True),
)


@dataclass(frozen=True)
class Published:
    """A row of the reference's table. `gb`: of the checkpoint; `bucket_gib`: that it says it took."""

    what: str
    kind: str
    ranks: int
    gb: float
    bucket_gib: float
    measured: float


PUBLISHED = (
    Published("GLM-4.5-Air, 8 x H800", "H800", 8, 212, 3.02, 3.47),
    Published("Qwen3-235B, 8 x H800", "H800", 8, 470, 2.67, 6.22),
    Published("DeepSeek-V3.1, 16 x H20", "H20", 16, 689, 5.39, 10.19),
    Published("Kimi-K2, 16 x H20", "H20", 16, 1029, 5.89, 14.36),
    Published("DeepSeek-V3.1, 256 x H20", "H20", 256, 689, 8.0, 11.33),
    Published("Kimi-K2, 256 x H20", "H20", 256, 1029, 8.0, 16.04),
)
H2D = 50e9
FIXED_SECONDS = 0.7
"""Measured on an H200: an update's cost beside its bytes."""
RATE = {"H800": 115e9, "H20": 86e9}
"""Fitted: bytes per second of broadcasts and reloads, whichever is slower."""
STEP_SECONDS = 0.0012
"""Fitted: for each bucket, each doubling of the number of ranks."""


def ours(row: Ours, cluster: Cluster) -> float:
    """The very plan on as many of the cluster's ranks."""
    cluster = cluster.model_copy(update={"ranks_per_host": row.ranks, "hosts": 1})
    nbytes = row.gib * GiB
    plan = make_plan(
        row.what,
        synthetic_metas(Synthetic(gb=nbytes / 1e9, tensors=int(nbytes / (64 * MiB))), row.ranks),
        slot_nbytes=DEFAULT_SLOT_MIB["cuda"] * MiB,
        slot_count=3,
        budget=2**60,
        staging=row.ranks > 1,
    )
    return predict(plan, cluster).seconds


def reference(row: Published) -> float:
    share = row.gb * 1e9 / row.ranks
    rounds = math.ceil(share / (row.bucket_gib * GiB))
    bucket = share / rounds
    simulation = Simulation()

    def update() -> Process:
        yield Delay(FIXED_SECONDS)
        for _ in range(rounds):
            yield Delay(bucket / H2D)
            for _ in range(row.ranks):
                yield Delay(bucket / RATE[row.kind] + STEP_SECONDS * math.log2(row.ranks))

    simulation.start(update())
    return simulation.run()


def copy_rate(processes: int, seconds: float = 1.0) -> float:
    """GB/s that so many processes copy at once, in all.

    As an update's processes do: 16 MiB from 256 MiB into one of three slots, and from there into 256 MiB. A
    copy of memory that no cache holds, which is the limit of an update, is slower.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    results: multiprocessing.Queue[float] = context.Queue()
    started = [context.Process(target=_copy, args=(barrier, results, seconds)) for _ in range(processes)]
    for process in started:
        process.start()
    rates = [results.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    return sum(rates)


def _copy(barrier: Barrier, results: multiprocessing.Queue[float], seconds: float) -> None:
    torch.set_num_threads(1)
    piece = 16 * MiB
    source, target = (torch.ones(16 * piece, dtype=torch.uint8) for _ in range(2))
    slots = torch.ones(3 * piece, dtype=torch.uint8)
    barrier.wait()
    begin = time.perf_counter()
    copied = 0
    while time.perf_counter() < begin + seconds:
        start, place = copied % source.numel(), copied % slots.numel()
        slots[place : place + piece].copy_(source[start : start + piece])
        target[start : start + piece].copy_(slots[place : place + piece])
        copied += piece
    results.put(2 * copied / (time.perf_counter() - begin) / 1e9)


def on_cpu(gib: float, ranks: int, rounds: int) -> None:
    """One line: medians over some updates of the stage of buckets' seconds, measured and by the model."""
    tensor_mib = 16.0
    arguments = argparse.Namespace(
        device="cpu",
        gib=gib,
        ranks=ranks,
        rounds=rounds,
        tensor_mib=tensor_mib,
        keep_buffers=False,
        verify=None,
    )
    before = copy_rate(2 * ranks), copy_rate(1)
    lines = run_ranks(serve, arguments)[0][1:]
    plan = make_plan(
        "cpu",
        synthetic_metas(Synthetic(gb=lines[0]["bytes"] / 1e9, tensors=lines[0]["tensors"]), ranks),
        slot_nbytes=DEFAULT_SLOT_MIB["cpu"] * MiB,
        slot_count=3,
        budget=2**60,
    )
    after = copy_rate(2 * ranks), copy_rate(1)
    together, alone = ((first + last) / 2 for first, last in zip(before, after, strict=True))
    measured, model = [], []
    for line in lines:
        rates = {"h2d": alone, "reload": alone, "memory": together}
        fields = {"name": "this host", "device": "cpu", "ranks_per_host": ranks, "rates": rates}
        measured.append(line["stages"]["buckets"])
        model.append(predict(plan, Cluster.model_validate(fields)).stages["buckets"])
    errors = [theirs / ours - 1 for theirs, ours in zip(model, measured, strict=True)]
    summary = {
        "benchmark": "model",
        "whose": "ours",
        "case": f"{gib} GiB, {ranks} ranks on CPU, the stage of buckets",
        "all_copy_gb_per_second": [round(before[0], 2), round(after[0], 2)],
        "one_copies_gb_per_second": [round(before[1], 2), round(after[1], 2)],
        "measured": round(statistics.median(measured), 4),
        "model": round(statistics.median(model), 4),
        "model_is": "predicted",
        "error": round(statistics.median(errors), 3),
        "errors": [round(error, 3) for error in errors],
    }
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cpu", action="store_true", help="measure updates on this host's CPU, and predict them"
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.cpu:
        on_cpu(arguments.gib, arguments.ranks, arguments.rounds)
        return
    cluster = load_cluster(CLUSTERS / "h100.toml")
    for row in OURS:
        show("ours", row.what, row.measured, ours(row, cluster), fitted=row.fitted)
    for published in PUBLISHED:
        show("reference", published.what, published.measured, reference(published), fitted=True)


def show(whose: str, what: str, measured: float, model: float, *, fitted: bool) -> None:
    line = {
        "benchmark": "model",
        "whose": whose,
        "case": what,
        "measured": measured,
        "model": round(model, 4),
        "model_is": "fitted" if fitted else "predicted",
        "error": round(model / measured - 1, 3),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
