"""The timeline of an update as one HTML file: nothing is loaded from anywhere, and no script runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ckpt_engine.timeline.figures import Figures, rows_of
from ckpt_engine.timeline.trace import (
    BROADCAST,
    COPY,
    H2D,
    P2P,
    RELOAD,
    SLOT_WAIT,
    SOURCE_WAIT,
    STAGES,
    RankTrace,
    Span,
)

COLOURS = {
    STAGES: "#c9ced6",
    SLOT_WAIT: "#d9534f",
    SOURCE_WAIT: "#f0ad4e",
    H2D: "#2f7ed8",
    P2P: "#7b4fb5",
    COPY: "#35a7a0",
    BROADCAST: "#46a04b",
    RELOAD: "#8a6d3b",
}
WIDTH, LEFT, ROW, GAP, HEAD = 1400, 180, 16, 8, 24
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222; max-width: 1640px }
table { border-collapse: collapse; margin: 0 0 1.5em }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th { text-align: left } svg { width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif } .bad { color: #b00020 }
"""


def page(figures: Figures, traces: Sequence[RankTrace]) -> str:
    """The whole page. `traces`: those whose lines are drawn; the figures may be of more ranks."""
    bad = "" if figures.outcome == "committed" else ' class="bad"'
    facts = [
        ("outcome", figures.outcome),
        ("seconds", f"{figures.seconds:.3f}"),
        ("bytes", f"{figures.nbytes} ({figures.rate:.1f} GB/s over the whole update)"),
        ("ranks", f"{figures.ranks} (traces of {figures.traced_ranks})"),
        ("buckets", str(figures.buckets)),
        ("ring", f"{figures.ring_nbytes} bytes, staging buffer {figures.staging_nbytes} bytes"),
    ]
    parts = [
        f"<h1>Update of {escape(figures.checkpoint)}</h1>",
        "<table>"
        + "".join(
            f"<tr><th>{name}</th><td{bad if name == 'outcome' else ''}>{escape(text)}</td></tr>"
            for name, text in facts
        )
        + "</table>",
        _table(
            "Stages",
            ("stage", "ms, longest", "on rank", "ms, shortest"),
            (
                (one.name, f"{one.seconds * 1e3:.2f}", str(one.rank), f"{one.fastest * 1e3:.2f}")
                for one in figures.stages
            ),
        ),
        _table(
            "Moves, on the rank that was longest at each",
            ("", "on rank", "bytes", "ms busy", "of the buckets' time", "GB/s", "limit", "achieved"),
            (
                (
                    move.track,
                    str(move.rank),
                    str(move.nbytes),
                    f"{move.busy * 1e3:.2f}",
                    f"{move.share:.0%}",
                    f"{move.rate:.2f}",
                    f"{move.limit:.2f} ({move.limit_is})",
                    f"{move.achieved:.0%}",
                )
                for move in figures.moves
            ),
        ),
        _table(
            "Waits, on the rank that waited longest",
            ("", "on rank", "ms"),
            ((name, str(rank), f"{seconds * 1e3:.2f}") for name, (rank, seconds) in figures.waits.items()),
        ),
        "<h2>Timeline</h2>",
        timeline(traces),
    ]
    title = escape(f"update of {figures.checkpoint}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    if not body:
        return ""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<h2>{escape(title)}</h2><table><tr>{heads}</tr>{body}</table>"


def timeline(traces: Sequence[RankTrace]) -> str:
    """An SVG: a line for each track of each rank, a rectangle for each span, which names itself."""
    begin, end = min(trace.begin for trace in traces), max(trace.end for trace in traces)
    scale = WIDTH / max(end - begin, 1e-9)
    shapes: list[str] = []
    y, rank = HEAD, None
    for row in rows_of(traces, resolution=1 / scale):
        if row.rank != rank:
            rank = row.rank
            y += GAP + ROW
            shapes.append(f'<text x="4" y="{y - 4}" font-weight="bold">rank {rank}</text>')
        shapes.append(f'<text x="16" y="{y + ROW - 5}">{row.track}</text>')
        shapes += (_rectangle(span, y, scale) for span in row.spans)
        y += ROW
    ticks = "".join(_tick(seconds, scale, y) for seconds in ticks_of(end - begin))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 60} {y + GAP}">'
        f"{ticks}{''.join(shapes)}</svg>"
    )


def _rectangle(span: Span, y: int, scale: float) -> str:
    about = f"{span.track}: {span.name}, {span.begin * 1e3:.3f} to {span.end * 1e3:.3f} ms"
    if span.nbytes:
        about += f", {span.nbytes} bytes"
        if span.seconds > 0:
            about += f", {span.nbytes / span.seconds / 1e9:.2f} GB/s"
    look = f'fill="{COLOURS[span.track]}" stroke="white" stroke-width="0.3"'
    return (
        f'<rect x="{LEFT + span.begin * scale:.2f}" y="{y}" width="{max(span.seconds * scale, 0.5):.2f}" '
        f'height="{ROW - 3}" {look}><title>{escape(about)}</title></rect>'
    )


def ticks_of(seconds: float) -> list[float]:
    """At most ten round instants from 0 to `seconds`."""
    steps = (mantissa * 10.0**power for power in range(-6, 9) for mantissa in (1, 2, 5))
    step = next(step for step in steps if seconds / step <= 10)
    return [number * step for number in range(int(seconds / step) + 1)]


def _tick(seconds: float, scale: float, height: int) -> str:
    x = LEFT + seconds * scale
    return (
        f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{HEAD}" y2="{height}" stroke="#eee"/>'
        f'<text x="{x:.2f}" y="{HEAD - 8}" text-anchor="middle">{seconds * 1e3:g} ms</text>'
    )
