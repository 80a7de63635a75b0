"""A rank under torchrun whose caller owns torch's default group; each rank is a host of its own.

So every update of several ranks needs a group, for its broadcasts. What happened in each scenario goes to
`{out}/rank-{r}.json` as {scenario: {...}}: the groups that were made, by name, and what the worker holds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ckpt_engine import ParameterServer
from ckpt_engine.transport.collectives import make_group
from ckpt_engine.update import movers
from tests.support.rank import Worker

TIMEOUT = 60.0

Tensors = dict[str, torch.Tensor]


def share(name: str, rank: int) -> Tensors:
    """`all` is held by every rank, `zero` by rank 0 alone. Several buckets, with slots of 1 MiB."""
    if name == "zero" and rank:
        return {}
    generator = torch.Generator().manual_seed(rank + len(name))
    return {f"{name}.{rank}.{i}": torch.randn(500, 700, generator=generator) for i in range(3)}


def checkpoint(name: str, size: int) -> Tensors:
    return {key: tensor for rank in range(size) for key, tensor in share(name, rank).items()}


class Caller:
    """Who owns the default group, and calls the parameter server."""

    def __init__(self, worker: Worker) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.results: dict[str, Any] = {}
        self._worker = worker
        self._made: list[str] = []
        counting = mock.patch.object(movers, "make_group", self._make_group)
        counting.start()

    def _make_group(self, kind: str, store: Any, name: str, *rest: Any, **poll: Any) -> Any:  # noqa: ANN401
        self._made.append(name)
        return make_group(kind, store, name, *rest, **poll)

    def use_default_group(self) -> float:
        """An all-reduce among all ranks; their sum."""
        ranks = torch.tensor(float(self.rank + 1))
        dist.all_reduce(ranks)
        return float(ranks)

    def update(
        self,
        scenario: str,
        ps: ParameterServer,
        name: str,
        ranks: Sequence[int] | None = None,
        *,
        calls: bool = True,
        fault: dict[str, Any] | None = None,
    ) -> None:
        """One update (`calls`: whether this rank is asked to take part), then the default group's turn."""
        self._made.clear()
        self._worker.asked = False
        entry: dict[str, Any] = {"error": None}
        try:
            if calls:
                ps.update(
                    name,
                    lambda paths: self._worker.update(paths, fault if self.rank == 0 else None),
                    timeout=TIMEOUT,
                    ranks=ranks,
                )
        except Exception as error:  # noqa: BLE001 - what was raised is the result
            entry["error"] = str(error)
        entry |= {"made": list(self._made), "asked": self._worker.asked, "default": self.use_default_group()}
        entry["held"] = self._worker.last.get("digests", {})
        entry["kept"] = ps._me is not None and ps._me.group is not None
        self.results[scenario] = entry


def updates(me: Caller, ps: ParameterServer) -> None:
    """Every scenario, in order: what one leaves behind is what the next one finds."""
    for name in ("all", "zero"):
        ps.register_checkpoint(name, named_tensors=share(name, me.rank))
        ps.gather_metas(name)
    me.update("first", ps, "all")
    me.update("again", ps, "all")
    # Of `zero` only rank 0 holds anything: the members are its ranks, and rank 0.
    me.update("subset 1", ps, "zero", [1], calls=me.rank in (0, 1))
    me.update("subset 1 again", ps, "zero", [1, 0], calls=me.rank in (0, 1))
    me.update("subset 2", ps, "zero", [2, 0, 2], calls=me.rank in (0, 2))
    me.update("subset 2 again", ps, "zero", [0, 2], calls=me.rank in (0, 2))
    me.update("alone", ps, "zero", [0], calls=me.rank == 0)
    me.update("subset 2 after alone", ps, "zero", [2], calls=me.rank in (0, 2))
    me.update("all after subsets", ps, "all")
    # Every rank holds a part of `all`: rank 1 gives its part, and is not updated.
    me.update("others give", ps, "all", [2, 0])
    me.update("others give again", ps, "all", [0, 2])
    me.update("fails", ps, "all", fault={"kind": "run", "bucket": 2, "action": "raise"})
    me.update("after a failure", ps, "all")
    me.update("after that", ps, "all", [])


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    # Else what rank 0 holds would be read from it, and no group made with it.
    os.environ["CKPT_ENGINE_P2P"] = "off"
    os.environ["CKPT_ENGINE_HOST_ID"] = f"host{os.environ['RANK']}"
    worker = Worker(int(os.environ["LOCAL_RANK"]))
    try:
        with ParameterServer(device="cpu", auto_pg=False) as too_early:
            try:
                too_early.gather_metas("all")
            except Exception as error:  # noqa: BLE001 - what was raised is the result
                without = f"{type(error).__name__}: {error}"
        dist.init_process_group("gloo")
        me = Caller(worker)
        me.results["without a group"] = without
        mine = dist.new_group(ranks=list(range(me.size)))
        with ParameterServer(device="cpu", auto_pg=False) as ps:
            updates(me, ps)
        # The caller's groups outlive the parameter server; a second one meets through the same store.
        me.results["default after close"] = me.use_default_group()
        with ParameterServer(device="cpu", auto_pg=False) as ps:
            ps.init_process_group()
            ps.register_checkpoint("all", named_tensors=share("all", me.rank))
            ps.gather_metas("all")
            me.update("second parameter server", ps, "all")
        me.results["default at the end"] = me.use_default_group()
        dist.barrier(mine)
        me.results["the caller's group is the default one"] = dist.is_initialized()
        dist.destroy_process_group()
        (out / f"rank-{me.rank}.json").write_text(json.dumps(me.results))
    finally:
        worker.close()


if __name__ == "__main__":
    main()
