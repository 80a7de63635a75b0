"""The part of vLLM's configuration that the worker extension uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_current: list[Any] = []


@contextmanager
def set_current_vllm_config(
    vllm_config: Any, check_compile: bool = False, prefix: str | None = None
) -> Iterator[None]:
    _current.append(vllm_config)
    try:
        yield
    finally:
        _current.pop()


def get_current_vllm_config() -> Any:
    return _current[-1]
