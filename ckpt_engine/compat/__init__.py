"""The reference's module names, for programs that import `checkpoint_engine` and are not to be changed.

They are in a folder of their own, which nobody has on the path by accident: `ckpt-engine compat -- CMD` runs
a command with it in front, where it also hides the reference itself if that is installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DIRECTORY = Path(__file__).parent


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (default: this process's environment) with `checkpoint_engine` on PYTHONPATH, first."""
    made = dict(os.environ if base is None else base)
    made["PYTHONPATH"] = os.pathsep.join([str(DIRECTORY), *filter(None, [made.get("PYTHONPATH")])])
    return made
