"""Runs a check on as many generated examples as FUZZ_SECONDS (default 3) allow, and says how many they were.

`make fuzz SECONDS=60` gives each target a minute. FUZZ_SEED, which is printed, repeats a run. What failed is
kept in `corpus/` and tried first next time; what was found once stands as an example in its test.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("FUZZ_SEED", str(time.time_ns() % 10**9)))
EXAMPLES = 100
"""In one go; then the clock is looked at."""
CORPUS = Path(__file__).parent / "corpus"

SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=DirectoryBasedExampleDatabase(CORPUS),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def fuzz(
    name: str, strategy: st.SearchStrategy[Any], check: Callable[[Any], object], known: tuple[Any, ...] = ()
) -> None:
    """`check` raises where an example is handled wrongly. `known`: examples that were once, tried first."""
    for example in known:
        check(example)
    say(f"FUZZ_SEED={SEED}")
    began, count, turn = time.monotonic(), 0, 0

    def counted(example: Any) -> None:  # noqa: ANN401
        nonlocal count
        count += 1
        check(example)

    while turn == 0 or time.monotonic() - began < SECONDS:
        run = given(strategy)(counted)
        # A corpus is tried once; the target's name is its place there.
        run.hypothesis.inner_test.__qualname__ = f"fuzz_{name}"  # type: ignore[attr-defined]
        phases = tuple(Phase) if turn == 0 else (Phase.generate, Phase.target, Phase.shrink)
        seed(SEED + turn)(settings(SETTINGS, phases=phases)(run))()
        turn += 1
    record = os.environ.get("FUZZ_REPORT")
    line = f"{name}: {count} examples in {time.monotonic() - began:.0f} s"
    say(line)
    if record:
        with open(record, "a") as file:
            file.write(f"{line}\n")


def mutations(good: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly good: cut, doubled, with bytes exchanged, put in, or taken out. And any bytes."""

    @st.composite
    def mutated(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(good))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(data)))
            what = draw(st.sampled_from(("flip", "put", "take", "cut", "double", "large")))
            if what == "flip" and at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            elif what == "put":
                data[at:at] = draw(st.binary(max_size=9))
            elif what == "take":
                del data[at : at + draw(st.integers(1, 9))]
            elif what == "cut":
                del data[at:]
            elif what == "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            elif what == "large":
                data[at : at + 8] = draw(st.sampled_from((b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8)))
        return bytes(data)

    return st.one_of(mutated(), st.binary(max_size=300))


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=8),
    st.sampled_from(("F32", "BF16", "float32", "dtype", "shape", "data_offsets", "x.safetensors", "../x")),
)  # fmt: skip


def documents(keys: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """JSON-like values, in which `keys` are frequent."""
    names = st.one_of(st.sampled_from(keys), st.text(max_size=6))
    return st.recursive(
        _LEAVES,
        lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(names, inner, max_size=6)),
        max_leaves=20,
    )
