"""In-place pinning fails at every step: nothing stays mapped or pinned, and no file of the user's is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected
from files_in_memory_for_tests import files_in, mapped_paths, two_files
from pinner_for_tests import FakePinner
from safetensors.torch import save_file

from ckpt_engine.checkpoint import CheckpointRegistry, HostArena, HostCheckpoint, loader, registry
from ckpt_engine.checkpoint.mapped_file import MappedFile
from ckpt_engine.errors import CheckpointError, HostMemoryError

FAULTS: dict[str, Callable[[pytest.MonkeyPatch, FakePinner], None]] = {}


def fault(inject: Callable[[pytest.MonkeyPatch, FakePinner], None]) -> None:
    FAULTS[inject.__name__] = inject


def raising(*_: object, **__: object) -> Any:  # noqa: ANN401
    raise CheckpointError("injected")


def on_call(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, whose call number `number` (from 0) fails."""
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        nonlocal calls
        calls += 1
        return raising() if calls == number + 1 else real(*arguments, **options)

    return counted


@fault
def the_second_map(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(MappedFile, "_map", on_call(1, MappedFile._map))


@fault
def the_arena(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(loader, "HostArena", raising)


@fault
def populating_a_file(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(MappedFile, "_populate", on_call(1, MappedFile._populate))


@fault
def populating_the_arena(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(HostArena, "populate", raising)


@fault
def the_first_pin(_: pytest.MonkeyPatch, pinner: FakePinner) -> None:
    pinner.fail_at = 0


@fault
def the_second_pin(_: pytest.MonkeyPatch, pinner: FakePinner) -> None:
    pinner.fail_at = 1


@fault
def the_last_pin(_: pytest.MonkeyPatch, pinner: FakePinner) -> None:
    pinner.fail_at = 2


@fault
def a_read(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(loader.SharedFile, "read", raising)


@fault
def a_copy(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr("ckpt_engine.checkpoint.tensor_copies.Copy.run", raising)


@fault
def the_metas(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(HostCheckpoint, "of", raising)


@fault
def closed_meanwhile(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    patch.setattr(CheckpointRegistry, "_check_open", on_call(1, CheckpointRegistry._check_open))


@fault
def interrupted(patch: pytest.MonkeyPatch, _: FakePinner) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(registry, "load", before_return(stop, registry.load))


def before_return(then: Callable[..., None], real: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        result = real(*arguments, **options)
        result.close()  # what no caller gets, nobody can close
        then()
        return result

    return both


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_failure_at_any_step_loses_nothing(
    name: str, threads: int, shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = two_files(shm)
    save_file({"m": torch.ones(9000)}, tmp_path / "m.safetensors")
    files = [*files_in(shm), tmp_path / "m.safetensors"]
    extra = {"z": torch.ones(70)}
    before = {file: file.read_bytes() for file in files}
    wanted = expected(tensors | {"m": torch.ones(9000)} | extra)
    with FakePinner() as pinner:
        held = CheckpointRegistry(threads=threads, pinner=pinner)
        with monkeypatch.context() as patch:
            FAULTS[name](patch, pinner)
            with pytest.raises((CheckpointError, HostMemoryError, KeyboardInterrupt)) as caught:
                held.register("c", files=files, named_tensors=extra, use_inplace_pin_memory=True)
        assert pinner.held == {}
        # While the error is still held: its traceback must keep nothing.
        assert not {str(file) for file in files} & mapped_paths()
        assert caught.value is not None
        assert held.names() == []
        assert {file: file.read_bytes() for file in files} == before
        pinner.fail_at = None
        again = held.register("c", files=files, named_tensors=extra, use_inplace_pin_memory=True)
        assert contents(again) == wanted
        assert files_in(shm) == []
        held.close()
