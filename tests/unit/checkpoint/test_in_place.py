"""Files in /dev/shm become host buffers where they are, and no failure loses one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, is_mapped, random_tensor, raw_file
from files_in_memory_for_tests import files_in, mapped_paths, two_files
from pinner_for_tests import FakePinner
from safetensors.torch import load_file, save_file

from ckpt_engine.checkpoint import (
    CheckpointRegistry,
    FileSelection,
    load,
    loader,
)
from ckpt_engine.checkpoint.in_place import lies_in_memory
from ckpt_engine.checkpoint.mapped_file import MappedFile
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError
from ckpt_engine.metadata import DTYPE_NBYTES, RankMetas
from ckpt_engine.planning.plan import make_plan


def test_mapped_pinned_and_removed(shm: Path) -> None:
    tensors = two_files(shm)
    files = files_in(shm)
    with FakePinner() as pinner:
        held = CheckpointRegistry(threads=2, pinner=pinner)
        checkpoint = held.register("c", files=files, use_inplace_pin_memory=True)
        assert contents(checkpoint) == expected(tensors)
        assert checkpoint.arena.nbytes == 0
        assert sorted(read_only for _, read_only in pinner.held.values()) == [True, True]
        assert {str(file) for file in files} <= mapped_paths()
        assert files_in(shm) == []
        for buffer in checkpoint.buffers:
            (begin,) = (at for at in pinner.held if at <= buffer.address < at + pinner.held[at][0])
            assert buffer.address + buffer.nbytes <= begin + pinner.held[begin][0]
        held.unregister("c")
        assert pinner.held == {}
        assert not {str(file) for file in files} & mapped_paths()
        held.close()


def test_load_alone_removes_nothing(shm: Path) -> None:
    two_files(shm)
    with FakePinner() as pinner:
        checkpoint = load("c", files_in(shm), pinner=pinner, in_place=True)
        assert len(files_in(shm)) == len(pinner.held) == 2
        checkpoint.unlink_files()
        checkpoint.unlink_files()  # gone already: nothing to do
        assert files_in(shm) == []
        checkpoint.close()


def test_with_other_files_and_tensors(shm: Path, tmp_path: Path) -> None:
    tensors = two_files(shm)
    other = {"m": random_tensor("float32", (70, 3)), "a.m": random_tensor("int8", (5,))}
    save_file(other, tmp_path / "other.safetensors")
    extra = {"z": random_tensor("float16", (11,))}
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        checkpoint = held.register(
            "c",
            files=[*files_in(shm), tmp_path / "other.safetensors"],
            named_tensors=extra,
            use_inplace_pin_memory=True,
        )
        assert contents(checkpoint) == expected(tensors | other | extra)
        assert len(pinner.held) == 3
        assert [file.name for file in files_in(tmp_path)] == ["other.safetensors"]
        held.close()


def test_every_dtype_and_any_alignment(shm: Path) -> None:
    tensors = {
        f"{dtype}.{shape}": random_tensor(dtype, shape, seed=len(shape))
        for dtype in DTYPE_NBYTES
        for shape in [(), (0,), (3,), (5, 7)]
    }
    save_file(tensors, shm / "a.safetensors")
    wanted = expected(load_file(shm / "a.safetensors"))
    with FakePinner() as pinner:
        checkpoint = load("c", files_in(shm), pinner=pinner, in_place=True)
        assert contents(checkpoint) == wanted
        checkpoint.close()


def odd_file(path: Path, sizes: list[int], padding: int) -> dict[str, bytes]:
    """Tensors of those sizes, of which none is aligned to anything."""
    header: dict[str, Any] = {}
    data = b""
    for number, size in enumerate(sizes):
        header[f"t{number:03}"] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [len(data), len(data) + size],
        }
        data += bytes((number * 7 + i) % 251 for i in range(size))
    raw_file(path, json.dumps(header).encode() + b" " * padding, data)
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("slot_nbytes", [256, 1024, 1 << 20])
def test_a_plan_of_unaligned_tensors(shm: Path, padding: int, slot_nbytes: int) -> None:
    """Buckets filled by the plan's ranges hold each tensor's bytes at its aligned place."""
    wanted = odd_file(shm / "a.safetensors", [3, 256, 0, 513, 1, 1000, 512, 256, 255, 0], padding)
    with FakePinner() as pinner:
        held = load("c", files_in(shm), pinner=pinner, in_place=True, buffer_limit=1100)
        assert len(held.buffers) > 1
        metas = RankMetas(
            rank=0, host="h", host_ip="::1", device_uuid="CPU-h-0", epoch=held.epoch, buffers=held.buffers
        )
        plan = make_plan("c", {0: metas}, slot_nbytes=slot_nbytes, slot_count=3, budget=1 << 30)
        found: dict[str, bytes] = {}
        for item in plan.buckets:
            slot = torch.zeros(item.nbytes, dtype=torch.uint8)
            for part in item.bucket.ranges:
                target = slot[part.bucket_offset : part.bucket_offset + part.nbytes]
                target.copy_(held.view(part.buffer, part.offset, part.nbytes))
            for tensor in item.bucket.tensors:
                assert tensor.offset % 256 == 0
                found[tensor.name] = slot[tensor.offset : tensor.offset + tensor.nbytes].numpy().tobytes()
        assert found == wanted
        held.close()


def test_only_when_asked_for(shm: Path) -> None:
    tensors = two_files(shm)
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        checkpoint = held.register("c", files=files_in(shm))
        assert contents(checkpoint) == expected(tensors)
        assert checkpoint.files == ()
        assert len(files_in(shm)) == 2
        held.close()


def test_without_a_pinner_it_warns_and_copies(shm: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = two_files(shm)
    held = CheckpointRegistry()
    checkpoint = held.register("c", files=files_in(shm), use_inplace_pin_memory=True)
    assert contents(checkpoint) == expected(tensors)
    assert checkpoint.files == ()
    assert len(files_in(shm)) == 2
    assert (
        "a.safetensors and 1 more files are copied, not pinned in place: this device pins no" in caplog.text
    )
    held.close()


def test_into_a_pool_it_warns_and_copies(shm: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = two_files(shm)
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        checkpoint = held.register(
            "c", files=files_in(shm), use_inplace_pin_memory=True, use_shared_memory_pool=True
        )
        assert contents(checkpoint) == expected(tensors)
        assert len(files_in(shm)) == 2
        assert "the shared memory pool takes copies" in caplog.text
        held.close()


def test_a_part_of_a_file_leaves_the_file(shm: Path) -> None:
    """Other ranks may need the rest of it."""
    tensors = two_files(shm)
    file = shm / "b.safetensors"
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        some = held.register(
            "some", files=[FileSelection(file, frozenset(["b.2", "b.4"]))], use_inplace_pin_memory=True
        )
        assert contents(some) == expected({name: tensors[name] for name in ("b.2", "b.4")})
        assert file.exists()
        (part,) = some.files
        assert part.nbytes < file.stat().st_size
        both = [
            FileSelection(file, frozenset(["b.0", "b.3"])),
            FileSelection(file, frozenset(["b.1", "b.2", "b.4", "b.5"])),
        ]
        whole = held.register("whole", files=both, use_inplace_pin_memory=True)
        assert contents(whole) == expected({name: tensors[name] for name in tensors if name[0] == "b"})
        assert not file.exists()
        assert contents(some) == expected({name: tensors[name] for name in ("b.2", "b.4")})
        held.close()


def test_which_files_lie_in_memory(shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_files(shm)
    file = shm / "a.safetensors"
    assert lies_in_memory(file)
    assert lies_in_memory(shm / "x" / ".." / "a.safetensors")
    assert not lies_in_memory(tmp_path / "a.safetensors")
    assert not lies_in_memory(shm / "a.bin")
    (tmp_path / "directory").symlink_to(shm)
    assert lies_in_memory(tmp_path / "directory" / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(file)
    assert not lies_in_memory(tmp_path / "link.safetensors")
    (shm / "out.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert not lies_in_memory(shm / "out.safetensors")
    monkeypatch.chdir(shm)
    assert lies_in_memory(Path("a.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert not lies_in_memory(Path("a.safetensors"))


def test_relative_paths_and_a_changed_directory(
    shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_files(shm)
    monkeypatch.chdir(shm)
    with FakePinner() as pinner:
        checkpoint = load("c", ["a.safetensors"], pinner=pinner, in_place=True)
        monkeypatch.chdir(tmp_path)
        checkpoint.unlink_files()
        checkpoint.close()
    assert [file.name for file in files_in(shm)] == ["b.safetensors"]


def test_empty_files_and_files_of_nothing(shm: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shm / "empty.safetensors").touch()
    raw_file(shm / "none.safetensors", {})
    save_file({"e": torch.empty(0, 3), "f": torch.empty(0)}, shm / "zero.safetensors")
    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        checkpoint = held.register("c", files=files_in(shm), use_inplace_pin_memory=True)
        assert contents(checkpoint) == {"e": ("float32", (0, 3), b""), "f": ("float32", (0,), b"")}
        assert pinner.calls == 0
        held.close()
    assert "empty.safetensors is empty (0 bytes): skipped" in caplog.text
    assert [file.name for file in files_in(shm)] == ["empty.safetensors", "none.safetensors"]


def test_views(shm: Path) -> None:
    two_files(shm)
    with FakePinner() as pinner:
        checkpoint = load("c", files_in(shm), pinner=pinner, in_place=True)
        buffer = checkpoint.buffers[1]
        with pytest.raises(ConfigError, match="not inside host buffer 1"):
            checkpoint.view(1, 0, buffer.nbytes + 1)
        with pytest.raises(ConfigError, match="not inside a map"):
            checkpoint.files[0].view(-1, 1)
        view = checkpoint.view(1, 5, 100)
        assert view.dtype == torch.uint8
        assert view.data_ptr() == buffer.address + 5
        copy = view.clone()
        checkpoint.close()
        with pytest.raises(CheckpointError, match="'c' is closed"):
            checkpoint.view(1, 5, 100)
        with pytest.raises(CheckpointError, match=r"the map of .*a\.safetensors is closed"):
            checkpoint.files[0].view(0, 1)
        assert torch.equal(view, copy)  # the last view keeps the memory
        address = view.data_ptr()
        assert is_mapped(address)
        del view
        assert str(shm / "b.safetensors") not in mapped_paths()


def test_a_file_that_shrinks_after_its_header(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read behind its end would be a SIGBUS, so each step looks again."""
    tensors = two_files(shm)
    file = shm / "b.safetensors"
    content = file.read_bytes()

    def cut(*_: object) -> None:
        os.truncate(file, 100)

    steps: list[tuple[type, str, str]] = [
        (loader.Taken, "map", "has 100 bytes, and had"),  # before it is mapped
        (MappedFile, "_populate", "changed while it was being mapped"),  # before its pages are there
    ]
    for kind, method, message in steps:
        with FakePinner() as pinner, monkeypatch.context() as patch:
            patch.setattr(kind, method, before(cut, getattr(kind, method)))
            with pytest.raises(CheckpointFormatError, match=message):
                load("c", files_in(shm), pinner=pinner, in_place=True)
        file.write_bytes(content)

    class Cutting(FakePinner):
        def pin(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
            super().pin(address, nbytes, read_only=read_only)
            if self.calls == 2:
                cut()

    with Cutting() as pinner, pytest.raises(CheckpointFormatError, match="has 100 bytes"):
        load("c", files_in(shm), pinner=pinner, in_place=True, threads=1)
    file.write_bytes(content)
    with FakePinner() as pinner:
        checkpoint = load("c", files_in(shm), pinner=pinner, in_place=True)
        assert contents(checkpoint) == expected(tensors)
        checkpoint.close()


def before(first: Callable[..., object], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: object) -> Any:  # noqa: ANN401
        first(*arguments)
        return then(*arguments)

    return both


def test_another_file_of_that_name_is_left(shm: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = two_files(shm)
    with FakePinner() as pinner:
        checkpoint = load("c", files_in(shm), pinner=pinner, in_place=True)
        os.replace(raw_file(shm / "new", {}), shm / "a.safetensors")
        checkpoint.unlink_files()
        assert contents(checkpoint) == expected(tensors)
        checkpoint.close()
    assert [file.name for file in files_in(shm)] == ["a.safetensors"]
    assert "a.safetensors is another file" in caplog.text


def test_a_file_that_cannot_be_removed_is_registered(
    shm: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = two_files(shm)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with FakePinner() as pinner:
        held = CheckpointRegistry(pinner=pinner)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", forbidden)
            held.register("c", files=files_in(shm), use_inplace_pin_memory=True)
        assert contents(held.get("c")) == expected(tensors)
        assert caplog.text.count("cannot be removed (Permission denied)") == 2
        held.close()


def test_a_missing_or_special_file_is_not_mapped(shm: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be mapped: No such file"):
        MappedFile(shm / "x", 0, 1, file_nbytes=1, whole=True)
    with pytest.raises(ConfigError, match=r"0 \.\. 2 are not inside a file of 1 bytes"):
        MappedFile(shm / "x", 0, 2, file_nbytes=1, whole=True)
