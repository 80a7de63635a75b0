"""HTTP: the client that asks an engine to receive, and the parameter server's own API."""

from __future__ import annotations

from ckpt_engine.errors import CkptEngineError


def missing_extra(error: ImportError) -> CkptEngineError:
    """What to raise when a package of the `server` extra cannot be imported."""
    return CkptEngineError(
        f"The HTTP API could not import {error.name or 'a package that it needs'} ({error}). "
        "Install what it needs with: pip install 'ckpt-engine[server]'"
    )
