"""Pinning: each arena as one range, before loading returns, and never longer than its memory is there."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import (
    contents,
    expected,
    is_mapped,
    memory_of,
    random_tensor,
    sharded_checkpoint,
)
from pinner_for_tests import FakePinner

from ckpt_engine.checkpoint import CheckpointRegistry, HostArena, load, loader, tensor_copies
from ckpt_engine.errors import CheckpointError, HostMemoryError

WEIGHTS = {"w": random_tensor("bfloat16", (300, 70)), "b": random_tensor("float32", (3,))}


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[mmap.mmap]]:
    """The memory of all arenas that loading makes."""
    memories: list[weakref.ref[mmap.mmap]] = []

    def made(nbytes: int, **options: Any) -> HostArena:  # noqa: ANN401
        arena = HostArena(nbytes, **options)
        memories.append(memory_of(arena))
        return arena

    monkeypatch.setattr(loader, "HostArena", made)
    return memories


def test_an_arena_is_pinned_once_as_a_whole(tmp_path: Path) -> None:
    tensors = sharded_checkpoint(tmp_path)
    with FakePinner() as pinner:
        checkpoint = load(
            "c", sorted(tmp_path.glob("*.safetensors")), WEIGHTS, pinner=pinner, buffer_limit=1000
        )
        assert pinner.held == {checkpoint.arena.address: (checkpoint.arena.nbytes, False)}
        assert checkpoint.arena.pinned
        assert contents(checkpoint) == expected(tensors | WEIGHTS)
        checkpoint.close()
        assert not checkpoint.arena.pinned
        checkpoint.close()
    assert [what for what, _ in pinner.log] == ["pin", "unpin"]


def test_pages_are_there_before_they_are_pinned() -> None:
    """Also those of a large arena that no tensor touches; `FakePinner` looks."""
    with FakePinner() as pinner:
        load("c", named_tensors={"w": torch.zeros(40 * 1024**2, dtype=torch.uint8)}, pinner=pinner).close()
    assert pinner.calls == 1


def test_without_a_pinner_nothing_is_pinned() -> None:
    checkpoint = load("c", named_tensors=WEIGHTS)
    assert not checkpoint.arena.pinned
    checkpoint.close()


def test_nothing_to_pin() -> None:
    with FakePinner() as pinner:
        load("c", pinner=pinner).close()
        load("c", named_tensors={"w": torch.empty(0)}, pinner=pinner).close()
    assert pinner.calls == 0


def test_unpinned_at_close_though_views_keep_the_memory() -> None:
    with FakePinner() as pinner:
        checkpoint = load("c", named_tensors=WEIGHTS, pinner=pinner)
        view = checkpoint.view(0, 0, 12)
        checkpoint.close()
        assert pinner.held == {}
        assert is_mapped(view.data_ptr())


def test_unpinned_when_nobody_closes() -> None:
    with FakePinner() as pinner:
        checkpoint = load("c", named_tensors=WEIGHTS, pinner=pinner)
        memory = memory_of(checkpoint.arena)
        del checkpoint
        gc.collect()
        assert pinner.held == {}
        assert memory() is None


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), OSError(12, "no more")])
def test_a_pin_that_fails(error: Exception, arenas: list[weakref.ref[mmap.mmap]]) -> None:
    with FakePinner(fail_at=0, error=error) as pinner:
        with pytest.raises(
            HostMemoryError, match=r"cannot be pinned: .*(out of memory|no more).*ulimit -l"
        ) as caught:
            load("c", named_tensors=WEIGHTS, pinner=pinner)
        assert arenas[0]() is None  # while the error is held
        assert caught.value is not None
        registry = CheckpointRegistry(pinner=pinner)
        registry.register("c", named_tensors=WEIGHTS)  # the next one works
        registry.close()


def test_a_pinners_own_words_are_kept(arenas: list[weakref.ref[mmap.mmap]]) -> None:
    with FakePinner(fail_at=0, error=HostMemoryError("my own words")) as pinner:
        with pytest.raises(HostMemoryError, match=r"^my own words$"):
            load("c", named_tensors=WEIGHTS, pinner=pinner)
        assert arenas[0]() is None


def test_a_read_that_fails_leaves_no_pin(tmp_path: Path, arenas: list[weakref.ref[mmap.mmap]]) -> None:
    sharded_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    for threads in (1, 4):
        with FakePinner() as pinner, pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader.SharedFile, "read", fail)
            with pytest.raises(CheckpointError, match="lost"):
                load("c", files, pinner=pinner, threads=threads)
            assert pinner.calls == 1 or threads > 1
        assert arenas.pop()() is None


def fail(*_: object) -> None:
    raise CheckpointError("lost")


def test_an_unpin_that_fails_is_logged_and_frees(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinner = FakePinner()
    checkpoint = load("c", named_tensors=WEIGHTS, pinner=pinner)
    memory = memory_of(checkpoint.arena)

    def lost(_: int) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(pinner, "unpin", lost)
    checkpoint.close()
    assert memory() is None
    assert "could not be unpinned" in caplog.text
    assert "device lost" in caplog.text


def test_reads_run_beside_the_pin_and_device_copies_after_it() -> None:
    for pin_first in (False, True):
        copying, order = threading.Event(), []
        arena = HostArena(5000)

        class Slow(FakePinner):
            def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
                assert pin_first or copying.wait(60)  # noqa: B023 - used in this turn only
                super().pin(address, nbytes, read_only=read_only)
                order.append("pin")  # noqa: B023

        def copy() -> None:
            order.append("copy")  # noqa: B023
            copying.set()  # noqa: B023

        tasks: list[Callable[[], None]] = [copy]
        with Slow() as pinner:
            loader._fill(arena, [], tasks, 2, pinner, ahead=pin_first)
            assert order == (["pin", "copy"] if pin_first else ["copy", "pin"])
            arena.close()


def test_device_tensors_ask_for_the_pin_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here: a tensor that says it is on one, and whose bytes another one copies."""
    asked: list[bool] = []

    class OnDevice(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda:0")

    def fill(*_: object, ahead: bool) -> None:
        asked.append(ahead)

    monkeypatch.setattr(loader, "_fill", fill)
    monkeypatch.setattr(loader, "wait_for_producers", lambda _: None)
    monkeypatch.setattr(tensor_copies, "is_traceable_wrapper_subclass", lambda _: False)
    load("c", named_tensors={"w": torch.zeros(4).as_subclass(OnDevice)})
    load("c", named_tensors={"w": torch.zeros(4)})
    assert asked == [True, False]


def test_keyboard_interrupt_while_pinning(arenas: list[weakref.ref[mmap.mmap]]) -> None:
    class Interrupted(FakePinner):
        def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
            super().pin(address, nbytes, read_only=read_only)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # the main thread has it by now, and waits for this one

    with Interrupted() as pinner:
        with pytest.raises(KeyboardInterrupt):
            load("c", named_tensors=WEIGHTS, pinner=pinner)
        assert arenas[0]() is None
