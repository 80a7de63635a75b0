"""`ckpt-engine plan`: a dry run. What an update would do, from the headers of the files alone.

No device and no process group is touched, so the plan of a fleet can be looked at on a laptop.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_engine.cli import AsJson, Verbose, format_nbytes, print_table, printable, table_console
from ckpt_engine.cli.predictions import numbers_up_to, show_join, show_joins, show_prediction, show_subset

if TYPE_CHECKING:
    from ckpt_engine.metadata import Metas
    from ckpt_engine.planning.cluster import Cluster
    from ckpt_engine.planning.joins import Slots
    from ckpt_engine.planning.plan import UpdatePlan

_SHOWN_BUCKETS = 20
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


class Kind(str, Enum):
    CUDA = "cuda"
    CPU = "cpu"


def plan_update(
    path: Annotated[
        Path | None, typer.Argument(help="A checkpoint's file, or a directory of them.", show_default=False)
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks, one per device.", show_default="the cluster's")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="A cluster's description (TOML or JSON): predicts how long the update would take there. It "
            "may describe the checkpoint, too, in place of a path."
        ),
    ] = None,
    joiners: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --cluster: fleets like it join another one by P2P, so many at once. Shows one join's "
            "stages, with each assignment of receivers, and how long 1, 2, 4 and so on take.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="With --cluster: only these of its ranks are updated, such as 0-7,12; they read by P2P what "
            "the others hold, who do nothing.",
            show_default=False,
        ),
    ] = None,
    slot_mib: Annotated[
        float | None,
        typer.Option(help="MiB of a slot.", show_default="CKPT_ENGINE_SLOT_MIB, else 256 on CUDA, 16 on CPU"),
    ] = None,
    slot_count: Annotated[
        int | None,
        typer.Option(min=1, help="Slots of the ring.", show_default="CKPT_ENGINE_SLOT_COUNT, else 3"),
    ] = None,
    free_memory_gib: Annotated[
        float | None,
        typer.Option(
            help="GiB that are free on the fullest device, of which PS_MEM_FRACTION may be used.",
            show_default="no limit",
        ),
    ] = None,
    device: Annotated[Kind, typer.Option(help="What the ranks' devices are.")] = Kind.CUDA,
    all_buckets: Annotated[
        bool, typer.Option("--all", help=f"Show every bucket, not only the first {_SHOWN_BUCKETS}.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what an update would do, without doing it.

    The ring of slots, which rank sends what, and in which order; with --cluster also how long it would take,
    by simulating just this plan. Touches no device.
    """
    from ckpt_engine.planning.cluster import load_cluster
    from ckpt_engine.planning.joins import Slots
    from ckpt_engine.planning.plan import make_plan
    from ckpt_engine.planning.prediction import predict
    from ckpt_engine.settings import GiB, load_settings

    if joiners is not None and cluster is None:
        raise typer.BadParameter("say who joins, with --cluster", param_hint="--joiners")
    if ranks is not None and (cluster is None or joiners is not None):
        raise typer.BadParameter(
            "say of which fleet, with --cluster and without --joiners", param_hint="--ranks"
        )
    members = None if ranks is None else _ranks_of(ranks)
    _check_positive(slot_mib, "--slot-mib")
    _check_positive(free_memory_gib, "--free-memory-gib")
    settings = load_settings()
    if slot_mib is not None:
        settings = settings.model_copy(update={"slot_mib": slot_mib})
    described = None if cluster is None else load_cluster(cluster)
    kind = device.value if described is None else described.device
    slots = Slots(
        slot_nbytes=settings.slot_nbytes(kind),
        slot_count=slot_count or settings.slot_count,
        budget=sys.maxsize
        if free_memory_gib is None
        else int(int(free_memory_gib * GiB) * settings.mem_fraction),
    )
    if described is not None and joiners is not None:
        _joins(path, world_size, described, slots, joiners, as_json=as_json, all_buckets=all_buckets)
        return
    metas = _metas(path, world_size, described)
    if described is not None and members is not None:
        _subset(metas, members, described, slots, as_json=as_json, all_buckets=all_buckets)
        return
    plan = make_plan(
        str(path or "the described checkpoint"),
        metas,
        slot_nbytes=slots.slot_nbytes,
        slot_count=slots.slot_count,
        budget=slots.budget,
        staging=len(metas) > 1 and kind != "cpu",
    )
    predicted = None if described is None else predict(plan, described)
    if as_json:
        extra = {} if predicted is None else {"predicted": asdict(predicted)}
        typer.echo(json.dumps(plan.to_dict() | extra))
        return
    _show(plan, len(metas), len(plan.buckets) if all_buckets else 0 if described else _SHOWN_BUCKETS)
    if described is not None and predicted is not None:
        show_prediction(described, predicted)


def _joins(
    path: Path | None,
    world_size: int | None,
    cluster: Cluster,
    slots: Slots,
    joiners: int,
    *,
    as_json: bool,
    all_buckets: bool,
) -> None:
    from ckpt_engine.planning.joins import owners_of, plan_join, predict_join, predict_joins

    owners = owners_of(_metas(path, world_size, cluster, of_owners=True), cluster)
    plan = plan_join(owners, cluster, slots).plan
    one = predict_join(owners, cluster, slots)
    many = predict_joins(owners, cluster, slots, numbers_up_to(joiners))
    if as_json:
        predicted = {"predicted": asdict(one), "joins": [asdict(row) for row in many]}
        typer.echo(json.dumps(plan.to_dict() | predicted))
        return
    _show(plan, cluster.world_size, len(plan.buckets) if all_buckets else 0)
    show_join(cluster, one)
    show_joins(plan.nbytes, many)


def _subset(
    metas: Metas, ranks: set[int], cluster: Cluster, slots: Slots, *, as_json: bool, all_buckets: bool
) -> None:
    from ckpt_engine.planning.joins import plan_subset, predict_subset

    plan = plan_subset(metas, ranks, cluster, slots).plan
    predicted = predict_subset(metas, ranks, cluster, slots)
    if as_json:
        typer.echo(json.dumps(plan.to_dict() | {"predicted": asdict(predicted)}))
        return
    _show(plan, len(ranks), len(plan.buckets) if all_buckets else 0)
    show_subset(cluster, predicted, len(ranks))


def _ranks_of(text: str) -> set[int]:
    """Of "0-7,12"."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise typer.BadParameter(f"{part!r} is neither a rank nor a range of them", param_hint="--ranks")
        found |= set(range(first, last + 1))
    return found


def _metas(
    path: Path | None, world_size: int | None, cluster: Cluster | None, *, of_owners: bool = False
) -> Metas:
    """Of the ranks that hold the checkpoint: the cluster's own, or those that it joins."""
    from ckpt_engine.planning.cluster import synthetic_metas

    if cluster is None:
        if path is None or world_size is None:
            raise typer.BadParameter("give a path and --world-size, or --cluster")
        return metas_from_headers(path, world_size)
    size = cluster.joined.world_size if of_owners else cluster.world_size
    if world_size not in (None, size):
        whose = "owners have" if of_owners else "cluster has"
        raise typer.BadParameter(f"{world_size}, but the {whose} {size} ranks", param_hint="--world-size")
    if path is not None:
        return metas_from_headers(path, size)
    if cluster.checkpoint is None:
        raise typer.BadParameter("give a path, or describe the checkpoint in the cluster's file")
    return synthetic_metas(cluster.checkpoint, size)


def metas_from_headers(path: Path, world_size: int) -> Metas:
    """What every rank would hold after `update` registered its share; only the addresses are not real."""
    from ckpt_engine.checkpoint import split_checkpoint
    from ckpt_engine.checkpoint.packing import pack
    from ckpt_engine.checkpoint.sources import collect_sources  # with its checks: what it refuses has no plan
    from ckpt_engine.metadata import HostBufferMeta, RankMetas

    metas: Metas = {}
    for rank in range(world_size):
        sources = collect_sources(split_checkpoint(path, rank, world_size), None)
        metas[rank] = RankMetas(
            rank=rank,
            host="",
            host_ip="",
            device_uuid=f"rank-{rank}",
            epoch="",
            buffers=tuple(
                HostBufferMeta(address=buffer.start, nbytes=buffer.nbytes, tensors=buffer.tensors)
                for buffer in pack([source.spec for source in sources.values()])
            ),
        )
    return metas


def _check_positive(value: float | None, option: str) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not a finite number above 0", param_hint=option)


def _show(plan: UpdatePlan, world_size: int, shown: int) -> None:
    console = table_console()
    console.print(
        f"{printable(plan.checkpoint)}: {plan.tensor_count} tensors, {format_nbytes(plan.nbytes)}, "
        f"in {len(plan.buckets)} buckets to {world_size} ranks"
    )
    console.print(
        f"ring: {plan.ring.count} slots of {format_nbytes(plan.ring.slot_nbytes)}, "
        f"{format_nbytes(plan.ring.nbytes)} ({plan.ring.nbytes} bytes) on each device"
    )
    if plan.staging_nbytes:
        console.print(
            f"staging: {format_nbytes(plan.staging_nbytes)} more on the device of each rank that broadcasts"
        )
    print_table(
        console,
        "Owners",
        (("rank", True), ("bytes", True)),
        ((str(rank), format_nbytes(nbytes)) for rank, nbytes in plan.owners().items()),
    )
    if not shown:
        return
    print_table(
        console,
        "Buckets",
        (
            ("bucket", True),
            ("owner", True),
            ("bytes", True),
            ("tensors", True),
            ("ring offset", True),
            ("waits for", True),
            ("first tensor", False),
        ),
        (
            (
                str(item.index),
                str(item.owner),
                format_nbytes(item.nbytes),
                str(len(item.bucket.tensors)),
                str(item.ring_offset),
                str(item.waits_for) if item.waits_for >= 0 else "-",
                printable(item.names()[0]),
            )
            for item in plan.buckets[:shown]
        ),
    )
    if len(plan.buckets) > shown:
        console.print(f"... {len(plan.buckets) - shown} more buckets (--all shows them)")
