"""The timeline of an update as a PNG, by matplotlib (`ckpt-engine[report]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt_engine.errors import ConfigError
from ckpt_engine.timeline.figures import Figures, rows_of
from ckpt_engine.timeline.page import COLOURS
from ckpt_engine.timeline.trace import STAGES, RankTrace

WIDTH_INCHES, DPI = 12.0, 110


def draw(figures: Figures, traces: Sequence[RankTrace], path: Path) -> None:
    """Writes the picture.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ConfigError(f"the picture needs matplotlib: install ckpt-engine[report] ({error})") from None
    seconds = max(max(trace.end for trace in traces) - min(trace.begin for trace in traces), 1e-9)
    rows = rows_of(traces, resolution=seconds / (WIDTH_INCHES * DPI))
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        axes.broken_barh(
            [(span.begin * 1e3, max(span.seconds, seconds / 2000) * 1e3) for span in row.spans],
            (number - 0.4, 0.8),
            facecolors=COLOURS[row.track],
            edgecolors="white",
            linewidth=0.5 if row.track == STAGES else 0,
        )
    axes.set_yticks(range(len(rows)), [f"rank {row.rank}  {row.track}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms from the update's begin")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    achieved = "   ".join(f"{move.track} {move.rate:.1f} of {move.limit:.1f} GB/s" for move in figures.moves)
    # The picture's font has no more than this.
    name, outcome = ascii(figures.checkpoint)[1:-1], ascii(figures.outcome)[1:-1]
    axes.set_title(
        f"{name}: {figures.nbytes / 1e9:.2f} GB in {figures.seconds * 1e3:.1f} ms, {outcome}\n{achieved}",
        fontsize=9,
        parse_math=False,
    )
    shown = dict.fromkeys(row.track for row in rows)
    axes.legend(
        handles=[Patch(color=COLOURS[track], label=track) for track in shown],
        ncols=len(shown),
        fontsize=7,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12 if len(rows) > 12 else -0.2),
        frameon=False,
    )
    figure.savefig(path, format="png", dpi=DPI)
