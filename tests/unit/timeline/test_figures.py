"""An update's figures, its page and its picture, from traces that are made up."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ckpt_engine.errors import ConfigError
from ckpt_engine.timeline.figures import figures_of, rows_of
from ckpt_engine.timeline.page import page, ticks_of, timeline
from ckpt_engine.timeline.picture import draw
from ckpt_engine.timeline.trace import (
    COPY,
    H2D,
    P2P,
    RELOAD,
    SLOT_WAIT,
    STAGES,
    RankTrace,
    Span,
)
from tests.support.traces import made_up

GB = 10**9


def span(track: str, begin: float, end: float, bucket: int = -1, nbytes: int = 0) -> Span:
    name = f"bucket {bucket}" if bucket >= 0 else "buckets"
    return Span(track=track, name=name, begin=begin, end=end, bucket=bucket, nbytes=nbytes)


def trace(rank: int, spans: Sequence[Span]) -> RankTrace:
    return made_up(rank, spans, checkpoint="<model> & co", buckets=2, nbytes=4 * GB, slot_count=3)


def two_ranks() -> list[RankTrace]:
    return [
        trace(
            0,
            [
                span(STAGES, 100, 102),
                span(H2D, 100, 100.5, 0, 2 * GB),
                span(RELOAD, 100.5, 101, 0, 2 * GB),
                span(RELOAD, 101, 102, 1, 2 * GB),
            ],
        ),
        trace(
            1,
            [
                span(STAGES, 100, 104),
                span(H2D, 100, 101, 1, 2 * GB),
                span(SLOT_WAIT, 101, 101.5, 1),
                span(COPY, 101, 102, 0, 2 * GB),
                span(RELOAD, 102, 103, 0, 2 * GB),
                span(RELOAD, 103, 103.5, 1, 2 * GB),
            ],
        ),
    ]


def test_figures_by_hand() -> None:
    """4 GB in 4 s. H2D is longest on rank 1: 2 GB in 1 s of its 4 s. Reloads are as long on both, 4 GB in
    1.5 s: the first is named. The fastest bucket of them took 0.5 s."""
    figures = figures_of(two_ranks())
    assert (figures.seconds, figures.rate) == (4, 1)
    assert [(one.name, one.seconds, one.rank, one.fastest) for one in figures.stages] == [
        ("buckets", 4, 1, 2)
    ]
    h2d, copy, reload = figures.moves
    assert (h2d.track, h2d.rank, h2d.nbytes, h2d.busy, h2d.share, h2d.rate) == (H2D, 1, 2 * GB, 1, 0.25, 2)
    assert (copy.track, copy.rank, copy.rate) == (COPY, 1, 2)
    assert (reload.rank, reload.busy, reload.limit) == (0, 1.5, 4)
    assert reload.achieved == pytest.approx(4 / 1.5 / 4)
    assert figures.waits == {SLOT_WAIT: (1, 0.5)}


def test_a_given_limit_counts() -> None:
    h2d = figures_of(two_ranks(), {H2D: 8.0}).moves[0]
    assert (h2d.limit, h2d.limit_is, h2d.achieved) == (8, "given", 0.25)


def test_reads_at_the_same_time_are_busy_once() -> None:
    both = [span(P2P, 100, 102, 0, GB), span(P2P, 101, 103, 1, GB), span(P2P, 104, 105, 2, GB)]
    (move,) = figures_of([trace(0, both)]).moves
    assert (move.busy, move.rate) == (4, 0.75)


def test_an_update_that_came_to_nothing_has_figures() -> None:
    nothing = made_up(0, [span(STAGES, 5, 5)], outcome="E: x")
    figures = figures_of([nothing])
    assert (figures.rate, figures.moves, figures.outcome) == (0, (), "E: x")
    assert "E: x" in page(figures, [nothing])


def test_short_spans_are_drawn_as_one() -> None:
    spans = [span(H2D, 100 + number / 1000, 100 + number / 1000 + 0.0009, number, 10) for number in range(5)]
    (row,) = rows_of([trace(0, [*spans, span(H2D, 101, 102, 5, 10)])], resolution=0.01)
    assert [(one.name, one.nbytes) for one in row.spans] == [("bucket 0 to 4", 50), ("bucket 5", 10)]
    assert row.spans[0].end == pytest.approx(0.0049)


@pytest.mark.parametrize("seconds", [3e-6, 0.00032, 0.02, 1, 7.3, 3600, 1e-9])
def test_ticks_are_few_and_round(seconds: float) -> None:
    ticks = ticks_of(seconds)
    assert ticks[0] == 0
    assert len(ticks) <= 11
    assert ticks[-1] <= seconds
    assert seconds < 1e-6 or len(ticks) > 2


class Reader(HTMLParser):
    """Collects tags and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_page_stands_alone_and_escapes_names() -> None:
    traces = two_ranks()
    reader = Reader()
    reader.feed(page(figures_of(traces), traces))
    assert reader.sources == []
    assert "script" not in reader.tags
    assert "model" not in reader.tags
    assert "Update of <model> & co" in reader.text
    assert "H2D: bucket 1, 0.000 to 1000.000 ms, 2000000000 bytes, 2.00 GB/s" in reader.text


def test_the_timeline_has_a_rectangle_for_each_span() -> None:
    traces = two_ranks()
    svg = ElementTree.fromstring(timeline(traces))
    rectangles = svg.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == sum(len(one.spans) for one in traces)
    right = max(float(one.attrib["x"]) + float(one.attrib["width"]) for one in rectangles)
    assert right == pytest.approx(180 + 1400)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    traces = two_ranks()
    draw(figures_of(traces), traces, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=re.escape("ckpt-engine[report]")):
        draw(figures_of(two_ranks()), two_ranks(), tmp_path / "a.png")
