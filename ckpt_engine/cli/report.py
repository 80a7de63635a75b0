"""`ckpt-engine report`: the timeline of an update, as a page, as a picture, and in numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_engine.cli import AsJson, Verbose, format_nbytes, print_table, printable, table_console

if TYPE_CHECKING:
    from ckpt_engine.timeline.figures import Figures

_SHOWN_RANKS = 8


def report(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Traces of one update, or a directory of traces (CKPT_ENGINE_TRACE_DIR): its latest update."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the page and the picture go: this path with .html and .png.",
            show_default="beside the first trace",
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="What a kind of move could reach at best, in GB/s, such as H2D=55.4. May be given several "
            "times.",
            show_default="the fastest bucket's",
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="So many ranks are drawn.")] = _SHOWN_RANKS,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show where an update spent its time.

    Writes a self-contained HTML page, and a PNG where matplotlib is installed (ckpt-engine[report]).
    """
    from ckpt_engine.timeline.figures import figures_of
    from ckpt_engine.timeline.page import page
    from ckpt_engine.timeline.trace import load

    limits = _limits(limit or [])
    loaded = load(traces)
    figures = figures_of(loaded, limits)
    base = out or (traces[0] if traces[0].is_dir() else traces[0].parent) / loaded[0].about.update
    files = [Path(f"{base}.html")]
    files[0].write_text(page(figures, loaded[:ranks]), encoding="utf-8")
    if find_spec("matplotlib") is not None:
        from ckpt_engine.timeline.picture import draw

        files.append(Path(f"{base}.png"))
        draw(figures, loaded[:ranks], files[-1])
    if as_json:
        typer.echo(json.dumps(figures.to_dict() | {"files": list(map(str, files))}))
        return
    _show(figures)
    typer.echo("\n".join(str(file) for file in files))


def _limits(given: list[str]) -> dict[str, float]:
    from ckpt_engine.timeline.trace import MOVES

    limits: dict[str, float] = {}
    for text in given:
        track, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if track not in MOVES or not 0 < value < float("inf"):
            raise typer.BadParameter(
                f"{text!r}: give one of {', '.join(MOVES)}, '=' and GB/s, such as H2D=55.4",
                param_hint="--limit",
            )
        limits[track] = value
    return limits


def _show(figures: Figures) -> None:
    console = table_console()
    console.print(
        f"{printable(figures.checkpoint)}: {printable(figures.outcome)}; {format_nbytes(figures.nbytes)} in "
        f"{figures.buckets} buckets to {figures.ranks} ranks in {figures.seconds:.3f} s"
    )
    print_table(
        console,
        "Stages",
        (("stage", False), ("ms, longest", True), ("on rank", True), ("ms, shortest", True)),
        (
            (one.name, f"{one.seconds * 1e3:.2f}", str(one.rank), f"{one.fastest * 1e3:.2f}")
            for one in figures.stages
        ),
    )
    print_table(
        console,
        "Moves, on the rank that was longest at each",
        (
            ("move", False),
            ("on rank", True),
            ("bytes", True),
            ("ms busy", True),
            ("GB/s", True),
            ("limit", True),
            ("achieved", True),
            ("limit is", False),
        ),
        (
            (
                move.track,
                str(move.rank),
                format_nbytes(move.nbytes),
                f"{move.busy * 1e3:.2f}",
                f"{move.rate:.2f}",
                f"{move.limit:.2f}",
                f"{move.achieved:.0%}",
                move.limit_is,
            )
            for move in figures.moves
        ),
    )
    for name, (rank, seconds) in figures.waits.items():
        console.print(f"longest {name}: {seconds * 1e3:.2f} ms in all, on rank {rank}")
