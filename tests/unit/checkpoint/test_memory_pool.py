"""The shared memory pool: one arena, one checkpoint at a time, any shape after any other."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, memory_of, random_tensor, sharded_checkpoint
from pinner_for_tests import FakePinner

from ckpt_engine.checkpoint import ArenaPool, CheckpointRegistry, HostArena, HostCheckpoint, loader, pool
from ckpt_engine.checkpoint import registry as registry_module
from ckpt_engine.errors import CheckpointError, CheckpointExistsError, HostMemoryError

SMALL = {"w": random_tensor("bfloat16", (30, 7), seed=1), "v": random_tensor("float32", (5,), seed=2)}
LARGE = {"x": random_tensor("float32", (3000,), seed=3), "w": random_tensor("int8", (11,), seed=4)}


def register(held: CheckpointRegistry, name: str, tensors: dict[str, torch.Tensor]) -> HostCheckpoint:
    return held.register(name, named_tensors=tensors, use_shared_memory_pool=True)


def test_kept_and_refilled() -> None:
    with FakePinner() as pinner:
        held = CheckpointRegistry(threads=2, pinner=pinner)
        first = register(held, "a", LARGE)
        arena = first.arena
        assert contents(first) == expected(LARGE)
        assert held.unregister("a") is True
        assert held.names() == []
        assert not arena.closed
        second = register(held, "b", SMALL)  # another shape, which fits
        assert second.arena is arena
        assert contents(second) == expected(SMALL)
        assert second.epoch != first.epoch
        assert pinner.log == [("pin", arena.address)]  # once, and it stays
        held.unregister("b")
        third = register(held, "a", LARGE)  # the first name again
        assert contents(third) == expected(LARGE)
        assert len({first.epoch, second.epoch, third.epoch}) == 3
        held.close()


def test_what_was_unregistered_cannot_be_read_any_more() -> None:
    held = CheckpointRegistry()
    first = register(held, "a", SMALL)
    held.unregister("a")
    with pytest.raises(CheckpointError, match="'a' is closed"):
        first.view(0, 0, 1)
    register(held, "b", SMALL)
    with pytest.raises(CheckpointError, match="'a' is closed"):
        first.view(0, 0, 1)
    held.close()


def test_one_at_a_time() -> None:
    held = CheckpointRegistry()
    first = register(held, "a", SMALL)
    with pytest.raises(CheckpointError, match=r"'a' is in the shared memory pool.*unregister it first"):
        register(held, "b", SMALL)
    with pytest.raises(CheckpointExistsError):
        register(held, "a", SMALL)
    assert held.names() == ["a"]
    assert contents(first) == expected(SMALL)
    other = held.register("b", named_tensors=LARGE)  # without the pool: as many as there is room for
    assert contents(other) == expected(LARGE)
    assert contents(first) == expected(SMALL)
    held.close()


def test_force_frees_it() -> None:
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        memory = memory_of(register(held, "a", SMALL).arena)
        assert held.unregister("a", force=True) is True
        assert memory() is None
        assert pinner.held == {}
        assert held.unregister("a", force=True) is False  # nothing left
        register(held, "a", SMALL)  # and the pool can be used again
        held.close()


def test_force_frees_it_after_the_name_is_gone() -> None:
    held = CheckpointRegistry()
    memory = memory_of(register(held, "a", SMALL).arena)
    held.unregister("a")
    assert memory() is not None
    assert held.unregister("a") is False
    assert memory() is not None
    assert held.unregister("a", force=True) is True
    assert memory() is None


def test_force_spares_a_pool_in_use() -> None:
    held = CheckpointRegistry()
    first = register(held, "a", SMALL)
    held.register("b", named_tensors=LARGE)
    assert held.unregister("b", force=True) is True
    assert held.unregister("x", force=True) is False
    assert contents(first) == expected(SMALL)
    held.close()


def test_it_grows_and_frees_the_old_arena_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        old = memory_of(register(held, "a", SMALL).arena)
        held.unregister("a")
        old_there: list[bool] = []

        def made(*arguments: Any, **options: Any) -> HostArena:  # noqa: ANN401
            old_there.append(old() is not None)
            return HostArena(*arguments, **options)

        monkeypatch.setattr(pool, "HostArena", made)
        large = register(held, "b", LARGE)
        assert old_there == [False]
        assert contents(large) == expected(LARGE)
        assert len(pinner.held) == 1
        held.unregister("b")
        assert register(held, "c", SMALL).arena is large.arena  # it does not shrink
        held.close()


def test_it_cannot_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CheckpointRegistry()
    arena = register(held, "a", SMALL).arena
    held.unregister("a")
    with monkeypatch.context() as patch:
        patch.setattr(pool, "available_host_memory", lambda: 1000)
        with pytest.raises(
            HostMemoryError, match=rf"pool has {arena.nbytes} bytes, \d+ are needed, and only 1000"
        ):
            register(held, "b", LARGE)
    assert held.names() == []
    assert register(held, "b", SMALL).arena is arena  # foreseen, so the old one is still there
    held.unregister("b")
    with monkeypatch.context() as patch:
        patch.setattr("ckpt_engine.checkpoint.arena.available_host_memory", lambda: 1000)
        with pytest.raises(HostMemoryError, match="1000 bytes"):
            register(held, "b", LARGE)
    assert arena.closed  # not foreseen: it is gone, and the pool is empty but works
    assert contents(register(held, "b", LARGE)) == expected(LARGE)
    held.close()


def failing_copy(*_: object) -> None:
    raise CheckpointError("lost")


def test_a_failing_first_fill_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memories: list[weakref.ref[mmap.mmap]] = []

    def made(*arguments: Any, **options: Any) -> HostArena:  # noqa: ANN401
        arena = HostArena(*arguments, **options)
        memories.append(memory_of(arena))
        return arena

    monkeypatch.setattr(pool, "HostArena", made)
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        with monkeypatch.context() as patch:
            patch.setattr("ckpt_engine.checkpoint.tensor_copies.Copy.run", failing_copy)
            with pytest.raises(CheckpointError, match="lost"):
                register(held, "a", SMALL)
        assert memories.pop()() is None
        assert pinner.held == {}
        pinner.fail_at = pinner.calls
        with pytest.raises(HostMemoryError, match="cannot be pinned"):
            register(held, "a", SMALL)
        assert memories.pop()() is None
        assert held.names() == []
        assert contents(register(held, "a", SMALL)) == expected(SMALL)
        held.close()


def test_a_failing_refill_keeps_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = sharded_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        arena = register(held, "a", LARGE).arena
        held.unregister("a")
        with monkeypatch.context() as patch:
            patch.setattr(loader.SharedFile, "read", failing_copy)
            with pytest.raises(CheckpointError, match="lost"):
                held.register("b", files=files, use_shared_memory_pool=True)
        with pytest.raises(CheckpointError, match="does not exist"):
            held.register("b", files=["/nowhere.safetensors"], use_shared_memory_pool=True)
        assert held.names() == []
        assert not arena.closed
        assert held.unregister("b") is False
        again = held.register("b", files=files, use_shared_memory_pool=True)
        assert again.arena is arena
        assert contents(again) == expected(tensors)
        assert pinner.calls == 1
        held.close()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_refill_does_not_populate_again(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def advised(_address: int, nbytes: int, _advice: int) -> int:
        calls.append(nbytes)
        return 0

    held = CheckpointRegistry(pinner=FakePinner() if pinned else None)
    register(held, "a", LARGE)
    held.unregister("a")
    monkeypatch.setattr("ckpt_engine.checkpoint.arena.advise", advised)
    register(held, "b", SMALL)
    held.unregister("b")
    register(held, "c", LARGE)
    assert calls == []
    held.close()


def test_an_empty_share() -> None:
    held = CheckpointRegistry()
    assert contents(register(held, "a", {})) == {}
    with pytest.raises(CheckpointError, match="'a' is in the shared memory pool"):
        register(held, "b", {})
    held.unregister("a")
    assert contents(register(held, "b", SMALL)) == expected(SMALL)
    held.unregister("b")
    kept = register(held, "c", {})
    assert kept.arena.nbytes > 0
    held.close()


def test_close_frees_it() -> None:
    for unregistered in (True, False):
        with FakePinner() as pinner:
            held = CheckpointRegistry(pinner=pinner)
            memory = memory_of(register(held, "a", SMALL).arena)
            if unregistered:
                held.unregister("a")
            held.close()
            assert memory() is None
            with pytest.raises(CheckpointError, match="closed"):
                register(held, "b", SMALL)
            held.close()


def test_closed_while_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    for refill in (True, False):
        with FakePinner() as pinner, monkeypatch.context() as patch:
            held = CheckpointRegistry(pinner=pinner)
            if refill:
                register(held, "old", SMALL)
                held.unregister("old")
            begun, go_on, arenas = paused_load(patch)
            with ThreadPoolExecutor(1) as threads:
                loading = threads.submit(register, held, "a", SMALL)
                assert begun.wait(60)
                with pytest.raises(CheckpointError, match="'a' is in the shared memory pool"):
                    register(held, "b", SMALL)
                assert held.unregister("a", force=True) is False  # still being loaded
                held.close()
                go_on.set()
                with pytest.raises(CheckpointError, match="closed"):
                    loading.result()
            assert arenas[0].closed
            assert held.names() == []


def paused_load(
    patch: pytest.MonkeyPatch,
) -> tuple[threading.Event, threading.Event, list[HostArena]]:
    begun, go_on, arenas = threading.Event(), threading.Event(), list[HostArena]()
    real: Callable[..., HostCheckpoint] = registry_module.load

    def paused(*args: object, **options: object) -> HostCheckpoint:
        checkpoint = real(*args, **options)
        arenas.append(checkpoint.arena)
        begun.set()
        assert go_on.wait(60)
        return checkpoint

    patch.setattr(registry_module, "load", paused)
    return begun, go_on, arenas


def test_many_threads_one_pool() -> None:
    held = CheckpointRegistry(threads=1)
    inside = threading.Semaphore(1)

    def turn(number: int) -> bool:
        try:
            checkpoint = register(held, f"c{number}", SMALL if number % 2 else LARGE)
        except CheckpointError:
            return False
        assert inside.acquire(blocking=False), "two checkpoints are in the pool"
        assert contents(checkpoint) == expected(SMALL if number % 2 else LARGE)
        inside.release()
        return held.unregister(f"c{number}")

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(turn, range(100))) > 0
    held.close()


def test_the_pool_alone() -> None:
    kept = ArenaPool()
    assert kept.nbytes == 0
    first = kept.fit(100)
    kept.drop_new()
    assert first.closed
    second = kept.fit(100)
    kept.keep()
    assert kept.fit(50) is second
    kept.drop_new()  # made before: it stays
    assert kept.nbytes == 100
    kept.close()
    kept.close()
    assert second.closed
    assert kept.nbytes == 0
