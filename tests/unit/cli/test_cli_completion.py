"""Shell completion, by the library of the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def completed(words: str, shell: str = "bash") -> list[str]:
    """What the shell is told for the last word."""
    environment = os.environ | {
        "_CKPT_ENGINE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    code = "from ckpt_engine.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_options_and_values() -> None:
    assert completed("ckpt-engine re") == ["report"]
    assert "--checkpoint-path" in completed("ckpt-engine update --ch")
    assert completed("ckpt-engine update --update-method b") == ["broadcast"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_a_shell_must_source(shell: str) -> None:
    code = "from ckpt_engine.cli.main import main; main()"
    environment = os.environ | {"_CKPT_ENGINE_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "ckpt-engine" in done.stdout
    assert f"complete_{shell}" in done.stdout
