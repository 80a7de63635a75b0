"""The registry: names, errors, memory given back, threads."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, memory_of

from ckpt_engine.checkpoint import CheckpointRegistry, HostCheckpoint, registry
from ckpt_engine.errors import CheckpointError, CheckpointExistsError, ConfigError, UnknownCheckpointError

Paused = tuple[threading.Event, threading.Event, list[weakref.ref[mmap.mmap]]]
WEIGHTS = {"w": torch.arange(1000.0)}


def test_register_get_unregister() -> None:
    held = CheckpointRegistry(threads=2)
    checkpoint = held.register("a", named_tensors=WEIGHTS)
    memory = memory_of(checkpoint.arena)
    assert held.get("a") is checkpoint
    assert contents(checkpoint) == expected(WEIGHTS)
    held.register("b")
    assert held.names() == ["a", "b"]
    assert held.unregister("a") is True
    assert memory() is None
    assert held.unregister("a") is False
    assert held.names() == ["b"]
    held.register("a", named_tensors=WEIGHTS)
    held.close()


def test_errors() -> None:
    held = CheckpointRegistry()
    with pytest.raises(
        UnknownCheckpointError, match="no checkpoint 'x' is registered here; registered: none"
    ):
        held.get("x")
    first = held.register("a", named_tensors=WEIGHTS)
    with pytest.raises(CheckpointExistsError, match="'a' is registered already"):
        held.register("a", named_tensors=WEIGHTS)
    assert held.get("a") is first
    held.register("b")
    with pytest.raises(UnknownCheckpointError, match="registered: 'a', 'b'"):
        held.get("x")
    bad: Any
    for bad in ("", None, 3):
        with pytest.raises(ConfigError, match="checkpoint_name"):
            held.register(bad)
    held.close()


def test_a_failure_registers_nothing() -> None:
    held = CheckpointRegistry()
    with pytest.raises(CheckpointError, match="does not exist"):
        held.register("a", files=["/nowhere.safetensors"], named_tensors=WEIGHTS)
    assert held.names() == []
    held.register("a", named_tensors=WEIGHTS)
    held.close()


def test_close_frees_all_and_ends_registering() -> None:
    held = CheckpointRegistry()
    memories = [memory_of(held.register(name, named_tensors=WEIGHTS).arena) for name in "ab"]
    held.close()
    held.close()
    assert held.names() == []
    assert [memory() for memory in memories] == [None, None]
    with pytest.raises(CheckpointError, match="closed"):
        held.register("c")


def paused_load(monkeypatch: pytest.MonkeyPatch) -> Paused:
    """Makes loading wait in its end; returns (it has begun, let it go on, memories)."""
    begun, go_on = threading.Event(), threading.Event()
    memories: list[weakref.ref[mmap.mmap]] = []
    real: Callable[..., HostCheckpoint] = registry.load

    def paused(*args: object, **options: object) -> HostCheckpoint:
        checkpoint = real(*args, **options)
        memories.append(memory_of(checkpoint.arena))
        begun.set()
        assert go_on.wait(60)
        return checkpoint

    monkeypatch.setattr(registry, "load", paused)
    return begun, go_on, memories


def test_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CheckpointRegistry()
    held.register("old", named_tensors=WEIGHTS)
    begun, go_on, _ = paused_load(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(held.register, "a", named_tensors=WEIGHTS)
        assert begun.wait(60)
        assert held.names() == ["old"]  # others go on; this one is not there yet
        assert held.get("old")
        assert held.unregister("a") is False
        with pytest.raises(CheckpointExistsError):
            held.register("a")
        go_on.set()
        assert loading.result() is held.get("a")
    held.close()


def test_closed_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CheckpointRegistry()
    begun, go_on, memories = paused_load(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(held.register, "a", named_tensors=WEIGHTS)
        assert begun.wait(60)
        held.close()
        go_on.set()
        with pytest.raises(CheckpointError, match="closed"):
            loading.result()
    assert held.names() == []
    assert memories[0]() is None


def test_many_threads_one_name() -> None:
    held = CheckpointRegistry(threads=1)

    def attempt(_: int) -> bool:
        try:
            held.register("a", named_tensors=WEIGHTS)
        except CheckpointExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(32))) == 1
    held.close()
