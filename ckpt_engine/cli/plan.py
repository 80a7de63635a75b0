"""`ckpt-engine plan`: a dry run. What an update would do, from the headers of the files alone.

No device and no process group is touched, so the plan of a fleet can be looked at on a laptop.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_engine.cli import AsJson, Verbose, format_nbytes, print_table, printable, table_console

if TYPE_CHECKING:
    from ckpt_engine.metadata import Metas
    from ckpt_engine.planning.plan import UpdatePlan

_SHOWN_BUCKETS = 20


class Kind(str, Enum):
    CUDA = "cuda"
    CPU = "cpu"


def plan_update(
    path: Annotated[Path, typer.Argument(help="A .safetensors file, or a directory of them.")],
    world_size: Annotated[int, typer.Option(min=1, help="Ranks, one per device.")],
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

    The ring of slots, which rank sends what, and in which order. Touches no device.
    """
    from ckpt_engine.planning.plan import make_plan
    from ckpt_engine.settings import GiB, load_settings

    _check_positive(slot_mib, "--slot-mib")
    _check_positive(free_memory_gib, "--free-memory-gib")
    settings = load_settings()
    if slot_mib is not None:
        settings = settings.model_copy(update={"slot_mib": slot_mib})
    plan = make_plan(
        str(path),
        metas_from_headers(path, world_size),
        slot_nbytes=settings.slot_nbytes(device.value),
        staging=world_size > 1 and device is not Kind.CPU,
        slot_count=slot_count or settings.slot_count,
        budget=sys.maxsize
        if free_memory_gib is None
        else int(int(free_memory_gib * GiB) * settings.mem_fraction),
    )
    if as_json:
        typer.echo(json.dumps(plan.to_dict()))
    else:
        _show(plan, world_size, len(plan.buckets) if all_buckets else _SHOWN_BUCKETS)


def metas_from_headers(path: Path, world_size: int) -> Metas:
    """What every rank would hold after `update` registered its share; only the addresses are not real."""
    from ckpt_engine.checkpoint import split_checkpoint
    from ckpt_engine.checkpoint.loader import collect_sources  # with its checks: what it refuses has no plan
    from ckpt_engine.checkpoint.packing import pack
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
        console.print(f"staging: {format_nbytes(plan.staging_nbytes)} more on the device of each owner")
    print_table(
        console,
        "Owners",
        (("rank", True), ("bytes", True)),
        ((str(rank), format_nbytes(nbytes)) for rank, nbytes in plan.owners().items()),
    )
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
