"""What this host's memory allows: how much there is for checkpoints, and how fast it can be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ckpt_engine.findings import Finding, Level
from ckpt_engine.host_memory import available_host_memory
from ckpt_engine.settings import GiB, Settings

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Memory for host arenas, and huge pages."""
    yield Finding(
        "host memory", Level.OK, f"{available_host_memory() / GiB:.1f} GiB available for checkpoints"
    )
    yield huge_pages(HUGE_PAGES, settings)


def huge_pages(path: Path, settings: Settings) -> Finding:
    """`path`: where the kernel says which mode is chosen: the word in brackets."""
    try:
        mode = path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        mode = ""
    if mode in ("always", "madvise"):
        used = {True: "asked for", False: "not asked for (CKPT_ENGINE_HUGE_PAGES)", None: "used where faster"}
        return Finding("huge pages", Level.OK, f"{mode}: {used[settings.huge_pages]}")
    if settings.huge_pages:
        return Finding(
            "huge pages",
            Level.WARNING,
            f"CKPT_ENGINE_HUGE_PAGES asks for them, but this kernel has them {mode or 'not at all'}",
            f"as root: echo madvise > {path}",
        )
    return Finding(
        "huge pages", Level.OK, f"{mode or 'unknown to this kernel'}: host arenas have ordinary pages"
    )
