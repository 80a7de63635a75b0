"""What `ckpt-engine plan --cluster` shows: a model's seconds, beside those that somebody measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from ckpt_engine.cli import format_nbytes, print_table, printable, table_console

if TYPE_CHECKING:
    from ckpt_engine.planning.cluster import Cluster
    from ckpt_engine.planning.joins import PredictedJoin, PredictedJoins
    from ckpt_engine.planning.prediction import Prediction


def numbers_up_to(largest: int) -> list[int]:
    """1, 2, 4 and so on, and `largest`."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


def show_prediction(cluster: Cluster, predicted: Prediction) -> None:
    """An update of all ranks."""
    _show_stages(cluster, predicted, f"{cluster.world_size} ranks")


def show_join(cluster: Cluster, predicted: PredictedJoin) -> None:
    """One fleet that joins another."""
    _show_reads(cluster, predicted, f"{cluster.world_size} ranks join {cluster.joined.world_size} by P2P")


def show_subset(cluster: Cluster, predicted: PredictedJoin, count: int) -> None:
    """So many ranks of a fleet, without the others."""
    others = cluster.world_size - count
    _show_reads(cluster, predicted, f"{count} ranks, which read by P2P what the other {others} hold")


def _show_reads(cluster: Cluster, predicted: PredictedJoin, what: str) -> None:
    console = _show_stages(cluster, predicted.prediction, what)
    print_table(
        console,
        "Who reads what (model)",
        (("assignment", False), ("s of the whole", True), ("taken", False)),
        (
            (name, f"{seconds:.4f}", "yes" if name == predicted.by else "")
            for name, seconds in predicted.assigned.items()
        ),
    )


def show_joins(nbytes: int, predicted: Sequence[PredictedJoins]) -> None:
    """So many at once; `nbytes`: of the checkpoint."""
    print_table(
        table_console(),
        "Joins at the same time (model): seconds until the first and the last one is done",
        (
            ("joiners", True),
            ("first", True),
            ("last", True),
            ("owners send", True),
            ("last, without --keep", True),
        ),
        (
            (
                str(row.joiners),
                f"{row.first:.3f}",
                f"{row.last:.3f}",
                f"{row.owner_nbytes / nbytes:.2f} x",
                f"{row.from_owners:.3f}",
            )
            for row in predicted
        ),
    )


def _show_stages(cluster: Cluster, predicted: Prediction, what: str) -> Console:
    console = table_console()
    measured = "not measured" if cluster.measured is None else f"{cluster.measured:.3f} s were measured"
    console.print(
        f"{printable(cluster.name)}, {what}: {predicted.seconds:.3f} s by the model, {measured}; "
        f"of the buckets' time the most is: {predicted.bottleneck}"
    )
    console.print(
        f"the model's figures: {printable(cluster.figures) or 'their file does not say where from'}"
    )
    print_table(
        console,
        "Predicted stages (model)",
        (("stage", False), ("s", True)),
        ((name, f"{seconds:.4f}") for name, seconds in predicted.stages.items()),
    )
    print_table(
        console,
        "The busiest link of each kind (model)",
        (
            ("link", False),
            ("links", True),
            ("bytes", True),
            ("s busy", True),
            ("GB/s", True),
            ("limit", True),
        ),
        (
            (
                use.kind,
                str(use.count),
                format_nbytes(use.nbytes),
                f"{use.busy:.4f}",
                f"{use.rate:.2f}",
                f"{use.capacity:.2f}",
            )
            for use in predicted.links
        ),
    )
    return console
