"""The `ckpt-engine` commands, and what they share. Only typer is imported until a command runs.

torchrun --nproc-per-node 8 -m ckpt_engine.cli.main update --checkpoint-path /models/m
ckpt-engine inspect /models/m
ckpt-engine plan /models/m --world-size 8
ckpt-engine doctor
ckpt-engine demo
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log what happens; show the traceback of an error.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_nbytes(nbytes: float) -> str:
    """`1.50 GiB`; whole bytes below 1 KiB."""
    power = 0
    while nbytes >= 1024 and power < len(_UNITS) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.2f} {_UNITS[power]}" if power else f"{nbytes:.0f} B"


def printable(text: str) -> str:
    """`text` with control characters escaped: names come from files, and a terminal obeys what it is sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table_console() -> Console:
    """A console for tables; off a terminal it is as wide as they need, so that no name is cut in a pipe."""
    from rich.console import Console

    # Names may hold what rich would take for markup or an emoji.
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    return console


def print_table(
    console: Console, title: str, columns: Iterable[tuple[str, bool]], rows: Iterable[Sequence[str]]
) -> None:
    """Prints a table; a column is `(its name, whether it holds numbers)`."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name, numeric in columns:
        # Folded, not cut, where a terminal is too narrow.
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
