"""A rank under torchrun that registers sharded state dicts, and says what their tensors are as a whole.

What happened in each scenario goes to `{out}/rank-{r}.json` as {scenario: {...}}: digests of what this rank
owns now, and of the whole tensors, which DTensor itself makes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckpt_engine import ParameterServer
from ckpt_engine.errors import UpdateError
from ckpt_engine.transport.collectives import GlooCollectives
from tests.support.rank import meet
from tests.support.worker import digest

SEED = 20261128
TIMEOUT = 60.0
BUCKET_NBYTES = 1000
"""So that there are many rounds, and tensors larger than a bucket."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 22), nn.Linear(22, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Model(nn.Module):
    """Sizes that no number of ranks divides; embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 10)
        self.layers = nn.ModuleList(Layer() for _ in "ab")
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))


def model(seed: int = SEED) -> Model:
    torch.manual_seed(seed)
    return Model()


def whole(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.to(dtype) if dtype is not None and full.is_floating_point() else full.contiguous()


class Trainer:
    def __init__(self, ps: ParameterServer, out: Path) -> None:
        self.ps = ps
        self.out = out
        self.results: dict[str, Any] = {}
        self.travelled = 0

    def watch_exchanges(self) -> None:
        """Keeps the bytes of the largest exchange."""
        own = GlooCollectives.exchange

        def exchange(group: Any, arriving: torch.Tensor, leaving: torch.Tensor, *rest: Any) -> None:  # noqa: ANN401
            self.travelled = max(self.travelled, arriving.numel(), leaving.numel())
            own(group, arriving, leaving, *rest)

        GlooCollectives.exchange = exchange  # type: ignore[method-assign]

    def register(
        self,
        scenario: str,
        state_dict: Mapping[str, Any],
        expected: Mapping[str, torch.Tensor] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Registers under "step", writes down what is there, and unregisters; all ranks walk together."""
        entry: dict[str, Any] = {"error": None}
        self.travelled = 0
        before = set(self.ps.checkpoint_names)
        try:
            options = {"bucket_nbytes": BUCKET_NBYTES, "timeout": TIMEOUT} | options
            self.ps.register_state_dict("step", state_dict, **options)
            held = self.ps._registry.get("step")
            entry["held"] = {
                tensor.name: digest(
                    held.view(number, tensor.offset, tensor.nbytes)
                    .view(getattr(torch, tensor.dtype))
                    .view(tensor.shape)
                )
                for number, buffer in enumerate(held.buffers)
                for tensor in buffer.tensors
            }
            entry["nbytes"], entry["address"], entry["epoch"] = held.nbytes, held.arena.address, held.epoch
        except Exception as error:  # noqa: BLE001 - what was raised is the result
            entry["error"], entry["message"] = type(error).__name__, str(error)
            if isinstance(error, UpdateError):
                entry["record"] = error.record.to_dict()
        entry["travelled"] = self.travelled
        if expected is not None:
            entry["expected"] = {name: digest(tensor) for name, tensor in expected.items()}
            entry["largest"] = max([0, *(tensor.nbytes for tensor in expected.values())])
        self.results[scenario] = entry
        if entry["error"] is None:
            self.ps.gather_metas("step", TIMEOUT)
        if not before:
            self.ps.unregister_checkpoint("step")
        # The trainer's own group is as it was.
        ranks = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(ranks)
        entry["default_group"] = float(ranks)


def fsdp(trainer: Trainer) -> None:
    """A model's steps, into memory that is kept."""
    trained = model()
    for layer in trained.layers:
        fully_shard(layer)
    fully_shard(trained)
    names: Callable[[str], str | None] = lambda name: None if name == "head.weight" else f"model.{name}"  # noqa: E731
    for step in range(3):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1.0 + step)
        state = trained.state_dict()
        expected = {names(k): whole(v, torch.bfloat16) for k, v in state.items() if names(k) is not None}
        trainer.register(
            f"fsdp {step}", state, expected, rename=names, dtype=torch.bfloat16, use_shared_memory_pool=True
        )
    trainer.register(
        "fsdp tied", trained.state_dict(), {k: whole(v, None) for k, v in trained.state_dict().items()}
    )
    per_name = {"norm.weight": torch.float64}
    expected = {k: whole(v, per_name.get(k)) for k, v in trained.state_dict().items()}
    trainer.register("cast of some", trained.state_dict(), expected, dtype=per_name.get)


def tensor_parallel(trainer: Trainer, mesh: DeviceMesh) -> None:
    """FSDP over tensor parallel: strided shards. And tensor parallel alone, in two replicas."""
    for scenario, sharded in (("fsdp of tp", True), ("tp in replicas", False)):
        trained = model()
        for layer in trained.layers:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(layer, mesh["tp"], plan)
            if sharded:
                fully_shard(layer, mesh=mesh["dp"])
        state = trained.state_dict()
        trainer.register(scenario, state, {name: whole(tensor, None) for name, tensor in state.items()})


def placements(trainer: Trainer, mesh: DeviceMesh) -> None:
    generator = torch.Generator().manual_seed(SEED)
    cases: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
        "rows": ((9, 7), [Shard(0), Replicate()]),
        "columns": ((9, 7), [Replicate(), Shard(1)]),
        "rows and columns": ((9, 7), [Shard(0), Shard(1)]),
        "rows twice": ((9, 7), [Shard(0), Shard(0)]),
        "last": ((5, 6, 7), [Shard(-1), Shard(1)]),
        "replicas": ((9, 7), [Replicate(), Replicate()]),
        "fewer than ranks": ((1, 7), [Shard(0), Shard(0)]),
        "empty": ((0, 4), [Shard(0), Shard(1)]),
        "scalar": ((), [Replicate(), Replicate()]),
    }
    state: dict[str, torch.Tensor] = {}
    for name, (shape, how) in cases.items():
        tensor = torch.randn(shape, generator=generator)
        for dtype in (torch.float32, torch.float16, torch.int8):
            state[f"{name}.{dtype}"] = distribute_tensor((tensor * 50).to(dtype), mesh, how)
    mine = torch.full((6, 3), float(dist.get_rank()))
    state["sums"] = DTensor.from_local(mine, mesh, [Partial(), Shard(0)])
    state["transposed"] = distribute_tensor(
        torch.randn(8, 6, generator=generator), mesh, [Shard(0), Shard(1)]
    ).t()
    trainer.register("placements", state, {name: whole(tensor, None) for name, tensor in state.items()})


def plain(trainer: Trainer) -> None:
    rank, size = trainer.ps.rank, trainer.ps.world_size
    state = model().state_dict()
    trainer.register("plain, alike on all", state, state)
    trainer.register("plain, on rank 0", state if rank == 0 else {}, state)
    stages = [{f"stage{number}.{k}": v + number for k, v in state.items()} for number in range(size)]
    trainer.register("stages", stages[rank], {k: v for stage in stages for k, v in stage.items()})


def refusals(trainer: Trainer) -> None:
    last = trainer.ps.rank == trainer.ps.world_size - 1
    good = model()
    fully_shard(good)
    state = good.state_dict()
    with torch.device("meta"):
        without = Model()
    fully_shard(without)
    trainer.register("meta", without.state_dict() if last else state)
    trainer.register("no tensor", {**state, "extra": b"state"} if last else state)
    trainer.register("no mapping", list(state) if last else state)
    trainer.register("one name for two", state, rename=lambda name: "all")
    trainer.register("other shapes", {"w": torch.zeros(2 + last)})
    shards = ChunkShardingSpec(dim=0, placements=[f"rank:{r}/cpu" for r in range(trainer.ps.world_size)])
    trainer.register("FSDP1", {"w": sharded_tensor.empty(shards, 8, 8)})
    odd = DTensor.from_local(
        torch.zeros(2 + last, 3), good_mesh(state), [Shard(0)], shape=torch.Size([8, 3]), stride=(3, 1)
    )
    trainer.register("odd shards", {"w": odd})
    trainer.register("missing shard", {} if last else state)
    trainer.register("bad dtype", state, dtype=torch.int8)
    trainer.register("other dtypes", state, dtype=torch.float16 if last else torch.bfloat16)
    trainer.register("other buckets", state, bucket_nbytes=BUCKET_NBYTES + last, timeout=5)

    def failing(done: int, total: int) -> None:
        if last and done:
            raise ValueError("no more of this")

    trainer.register("in the middle", state, on_progress=failing)
    trainer.register("after that", state, {name: whole(tensor, None) for name, tensor in state.items()})
    if last:
        trainer.ps.register_checkpoint("step", named_tensors={"w": torch.zeros(3)})
    trainer.register("name taken", state)
    trainer.ps.unregister_checkpoint("step")


def lose_the_last(trainer: Trainer) -> None:
    """The last rank dies when its first bucket has come; the others write down what they see."""
    trained = model()
    fully_shard(trained)

    def dying(done: int, total: int) -> None:
        if trainer.ps.rank == trainer.ps.world_size - 1:
            os._exit(9)

    begun = time.monotonic()
    try:
        options: dict[str, Any] = {"bucket_nbytes": BUCKET_NBYTES, "timeout": TIMEOUT, "on_progress": dying}
        trainer.ps.register_state_dict("step", trained.state_dict(), **options)
        said = {"error": None}
    except UpdateError as error:
        said = {"error": type(error).__name__, "message": str(error)}
    said |= {"seconds": time.monotonic() - begun, "names": trainer.ps.checkpoint_names}
    (trainer.out / f"rank-{trainer.ps.rank}.json").write_text(json.dumps(said))


def good_mesh(state: Mapping[str, torch.Tensor]) -> DeviceMesh:
    return next(tensor.device_mesh for tensor in state.values() if isinstance(tensor, DTensor))


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if sys.argv[2:] == ["lose"]:
        with ParameterServer(device="cpu") as ps:
            lose_the_last(Trainer(ps, out))
        # The trainer's own group is missing a rank: it is not waited for.
        os._exit(0)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    with ParameterServer(device="cpu") as ps:
        trainer = Trainer(ps, out)
        trainer.watch_exchanges()
        try:
            fsdp(trainer)
            placements(trainer, mesh)
            tensor_parallel(trainer, mesh)
            plain(trainer)
            refusals(trainer)
        finally:
            (out / f"rank-{ps.rank}.json").write_text(json.dumps(trainer.results))
        meet(out, "done", ps.rank, ps.world_size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
