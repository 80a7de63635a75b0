"""vLLM's processes at less cost: `python -m tests.engines.vllm.light MODULE ARGUMENTS` runs MODULE so.

They are forked (`tests.support.forking`), and workers do not look for work without a pause for a second after
each call, in which they would take the cores from those that have some.
"""

from __future__ import annotations

import os
import sys

from tests.support.forking import fork_instead_of_spawn, run

LOOK_SECONDS = 0.01


def make_light() -> None:
    """In this process, and those that it starts; on a GPU all is as ever."""
    if os.environ.get("TEST_DEVICE", "cpu") != "cpu":
        return
    fork_instead_of_spawn()
    from vllm.distributed.device_communicators import shm_broadcast

    if (condition := getattr(shm_broadcast, "SpinCondition", None)) is not None:
        (seconds,) = condition.__init__.__defaults__
        assert seconds >= LOOK_SECONDS
        condition.__init__.__defaults__ = (LOOK_SECONDS,)


if __name__ == "__main__":
    make_light()
    run(sys.argv[1:])
