"""Tests that read by P2P need mooncake: skipped where it is not, but never in CI."""

from __future__ import annotations

import os

import pytest


def need_mooncake() -> None:
    if os.environ.get("CI"):
        import mooncake.engine  # noqa: F401 - what is missing fails the run: make system
    else:
        pytest.importorskip("mooncake.engine", reason="mooncake is not installed, or libibverbs1 is missing")
