"""Files that commands write: all of one or nothing of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import typer

from ckpt_engine.errors import ConfigError


def check_can_be_written(path: Path | None, option: str) -> None:
    """Before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path}: give a file in a directory that exists", param_hint=option)


def write(path: Path, text: bytes) -> None:
    """All of it or nothing: who reads the file never sees a part."""
    made: Path | None = None
    try:
        path = path.resolve()  # a link stays one
        if path.exists() and not path.is_file():
            path.write_bytes(text)  # a pipe, or /dev/stdout
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            made = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o666 & ~_umask())
        made.replace(path)
        made = None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
