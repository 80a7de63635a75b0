"""`ckpt-engine compat -- CMD`: a program that imports the reference's modules, with ours in their place."""

from __future__ import annotations

import os
import shutil
from typing import Annotated

import typer

from ckpt_engine.errors import ConfigError


def compat(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, after `--`.")],
) -> None:
    """Run a command in which `import checkpoint_engine` finds ckpt-engine.

    Such as SGLang's own updater: ckpt-engine compat -- python -m sglang.srt.checkpoint_engine.update ...
    """
    from ckpt_engine.compat import environment

    if shutil.which(command[0]) is None:
        raise ConfigError(f"no command {command[0]!r} on the path")
    os.execvpe(command[0], command, environment())  # noqa: S606 - the command that the user gave
