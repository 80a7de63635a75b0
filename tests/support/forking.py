"""`python -m tests.support.forking MODULE ARGUMENTS`: as `python -m MODULE ARGUMENTS`, but the processes that
it would spawn are forked.

An engine's processes each import the same for ten seconds before they do anything: here they have it at once.
Not for what uses CUDA.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from multiprocessing import context


def fork_instead_of_spawn() -> None:
    """In this process, and those that it starts."""
    context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]  # type: ignore[attr-defined]


def run(command: Sequence[str]) -> None:
    """MODULE ARGUMENTS."""
    sys.argv[:] = command
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    fork_instead_of_spawn()
    run(sys.argv[1:])
