"""Loading: bits as safetensors reads them, and nothing left behind by a failure."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import (
    bits,
    contents,
    expected,
    memory_of,
    open_files,
    random_tensor,
    raw_file,
    sharded_checkpoint,
)
from safetensors.torch import load_file, save_file

from ckpt_engine.checkpoint import (
    FileSelection,
    HostArena,
    SafetensorsHeader,
    file_reads,
    load,
    loader,
    sources,
    tensor_copies,
)
from ckpt_engine.errors import CheckpointError, CheckpointFormatError, ConfigError, HostMemoryError
from ckpt_engine.metadata import DTYPE_NBYTES
from tests.support.npy_files import NpyFile

Arenas = list[weakref.ref[mmap.mmap]]

SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (7, 13), (257,), (2, 3, 5, 7)]


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> Arenas:
    """The memory of all arenas that loading makes."""
    memories: Arenas = []

    def made(nbytes: int, **options: Any) -> HostArena:  # noqa: ANN401
        arena = HostArena(nbytes, **options)
        memories.append(memory_of(arena))
        return arena

    monkeypatch.setattr(loader, "HostArena", made)
    return memories


def all_dtypes() -> dict[str, torch.Tensor]:
    return {
        f"{dtype}.{index}": random_tensor(dtype, shape, seed=index)
        for dtype in DTYPE_NBYTES
        for index, shape in enumerate(SHAPES)
    }


def test_every_dtype_and_shape_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(all_dtypes(), path)
    checkpoint = load("c", [path])
    assert contents(checkpoint) == expected(load_file(path))
    assert checkpoint.name == "c"
    assert checkpoint.nbytes == sum(len(bits(tensor)) for tensor in all_dtypes().values())


def test_every_dtype_and_shape_from_tensors() -> None:
    checkpoint = load("c", named_tensors=all_dtypes())
    assert contents(checkpoint) == expected(all_dtypes())


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    save_file(
        {f"f{i}": random_tensor("uint8", (5_000_001,), i) for i in range(8)}, tmp_path / "a.safetensors"
    )
    shards = [NpyFile([("n", random_tensor("uint8", (3000, 700), i), 1)]) for i in range(2)]
    files = [shard.write(tmp_path / f"model.0.{i}.npy") for i, shard in enumerate(shards)]
    told: list[tuple[int, int]] = []
    checkpoint = load(
        "c",
        [tmp_path / "a.safetensors", *files],
        {"t": torch.zeros(123, 7)},
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert len(told) > 3
    assert {total for _, total in told} == {checkpoint.nbytes}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == checkpoint.nbytes


def test_who_hears_of_progress_can_end_it(arenas: Arenas) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError(f"enough at {done} of {total}")

    with pytest.raises(RuntimeError, match=r"enough at 4 of 8"):
        load("c", named_tensors={"a": torch.zeros(1), "b": torch.zeros(1)}, threads=1, on_progress=stop)
    assert [memory() for memory in arenas] == [None]


def test_host_buffers(tmp_path: Path) -> None:
    tensors = sharded_checkpoint(tmp_path)
    checkpoint = load("c", sorted(tmp_path.glob("*.safetensors")), {"a": torch.ones(300)}, buffer_limit=512)
    assert contents(checkpoint) == expected({"a": torch.ones(300)} | tensors)
    names = [tensor.name for buffer in checkpoint.buffers for tensor in buffer.tensors]
    assert names == sorted(names)
    assert len(checkpoint.buffers) > 2
    end = checkpoint.arena.address
    for index, buffer in enumerate(checkpoint.buffers):
        assert end <= buffer.address < end + 256
        assert buffer.address % 256 == 0
        if buffer.nbytes:
            assert checkpoint.view(index, 0, buffer.nbytes).data_ptr() == buffer.address
        end = buffer.address + buffer.nbytes
    assert end == checkpoint.arena.address + checkpoint.arena.nbytes
    with pytest.raises(ConfigError, match="not inside host buffer 0"):
        checkpoint.view(0, 0, checkpoint.buffers[0].nbytes + 1)
    with pytest.raises(ConfigError, match="no host buffer -1"):
        checkpoint.view(-1, 0, 1)


def test_padding_is_zero_and_epochs_differ() -> None:
    first, second = (load("c", named_tensors={"a": torch.ones(1), "b": torch.ones(1)}) for _ in range(2))
    assert not first.view(0, 4, 252).any()
    assert first.epoch != second.epoch
    assert len(first.epoch) == 32


def test_cut_into_many_pieces_and_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = sharded_checkpoint(tmp_path) | {"large": random_tensor("float32", (1000,))}
    save_file({"large": tensors["large"]}, tmp_path / "z.safetensors")
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        budget = 1 + offset % 7
        return real(descriptor, [buffers[0][:budget], *([] if len(buffers[0]) else buffers[1:])], offset)

    monkeypatch.setattr(file_reads.os, "preadv", short)
    monkeypatch.setattr(file_reads, "PIECE_NBYTES", 100)
    monkeypatch.setattr(tensor_copies, "PIECE_NBYTES", 100)
    strided = random_tensor("float32", (40, 50)).t()
    checkpoint = load("c", sorted(tmp_path.glob("*.safetensors")), {"strided": strided}, threads=4)
    assert contents(checkpoint) == expected(tensors | {"strided": strided})


def test_large_tensors_in_16_mib_pieces(tmp_path: Path) -> None:
    tensors = {"a": random_tensor("uint8", (40 * 1024**2 + 77,)), "b": random_tensor("int64", (3, 1000))}
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = load(
        "c", [tmp_path / "a.safetensors"], {"c": tensors["a"], "d": tensors["a"].view(-1, 3)[:, 1]}
    )
    held = contents(checkpoint)
    reference = expected(tensors | {"c": tensors["a"], "d": tensors["a"].view(-1, 3)[:, 1]})
    assert all(held[name] == reference[name] for name in reference)  # not ==: its report would be 100 MB


def test_tensors_of_all_kinds_are_copied() -> None:
    base = random_tensor("int32", (6, 8))
    tensors = {
        "transposed": base.t(),
        "sliced": base[1::2, ::3],
        "expanded": base[:1].expand(5, 8),
        "scalar": base[2, 3],
        "parameter": torch.nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(1))),
        "conjugate": torch.view_as_complex(torch.arange(8.0).view(4, 2)).conj(),
        "channels_last": torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last),
        "reversed": base.flip(0),
    }
    before = expected({name: tensor.resolve_conj() for name, tensor in tensors.items()})
    checkpoint = load("c", named_tensors=tensors)
    base.zero_()  # a snapshot does not follow
    assert contents(checkpoint) == before


def test_selected_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: random_tensor("float16", (5, 3), seed=ord(name)) for name in "abcde"}
    save_file(tensors, path)
    first = FileSelection(path, frozenset("ad"))
    assert contents(load("c", [first])) == expected({name: tensors[name] for name in "ad"})
    both = load("c", [first, FileSelection(path, frozenset("bce"))])
    assert contents(both) == expected(tensors)
    with pytest.raises(CheckpointFormatError, match=r"a\.safetensors: has no tensor 'x', which was selected"):
        load("c", [FileSelection(path, frozenset("ax"))])


def test_no_sources_and_empty_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty.safetensors").touch()
    for checkpoint in (load("c"), load("c", [], {}), load("c", [str(tmp_path / "empty.safetensors")])):
        assert checkpoint.buffers == ()
        assert checkpoint.nbytes == checkpoint.arena.nbytes == 0
        checkpoint.close()
    assert "empty.safetensors is empty (0 bytes): skipped" in caplog.text
    only_zero_sizes = load("c", named_tensors={"a": torch.empty(0), "b": torch.empty(2, 0)})
    assert contents(only_zero_sizes) == {"a": ("float32", (0,), b""), "b": ("float32", (2, 0), b"")}


def test_a_name_twice(tmp_path: Path, arenas: Arenas) -> None:
    for file in ("x", "y"):
        save_file({"w": torch.zeros(1)}, tmp_path / file)
    with pytest.raises(CheckpointFormatError, match=r"'w' is there twice: in .*/x and in .*/y"):
        load("c", [tmp_path / "x", tmp_path / "y"])
    with pytest.raises(CheckpointFormatError, match=r"'w' is there twice: in .*/x and in named_tensors"):
        load("c", [tmp_path / "x"], {"w": torch.zeros(1)})
    with pytest.raises(CheckpointFormatError, match=r"'w' is there twice: in .*/x and in .*/x"):
        load("c", [tmp_path / "x", tmp_path / "x"])
    assert arenas == []


def freed_storage() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 2).to_sparse(), "'w' has layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "'w' is on the meta device"),
        (torch.ones(2, dtype=torch.complex128), "'w' has dtype complex128"),
        (freed_storage(), "'w' has had its storage freed"),
    ],
)
def test_tensors_that_cannot_be_copied(tensor: torch.Tensor, message: str, arenas: Arenas) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("c", named_tensors={"w": tensor})
    assert arenas == []


def test_bad_arguments() -> None:
    bad: Any
    for bad in ([1.0], None, "w"):
        with pytest.raises(ConfigError, match="'w' is a"):
            load("c", named_tensors={"w": bad})
    for bad in ("", 3):
        with pytest.raises(ConfigError, match="not a tensor's name"):
            load("c", named_tensors={bad: torch.ones(1)})
    bad = [("w", torch.ones(1))]
    with pytest.raises(ConfigError, match="give a mapping"):
        load("c", named_tensors=bad)
    for bad in ("a.safetensors", Path("a.safetensors"), FileSelection(Path("a"))):
        with pytest.raises(ConfigError, match="give a list of files"):
            load("c", bad)
    bad = [7]
    with pytest.raises(ConfigError, match="7 is neither a path nor"):
        load("c", bad)
    with pytest.raises(ConfigError, match="threads=0"):
        load("c", threads=0)


def test_a_broken_file_is_named(tmp_path: Path, arenas: Arenas) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "good")
    raw_file(tmp_path / "bad", {"v": 3})
    with pytest.raises(CheckpointFormatError, match="bad: tensor 'v'"):
        load("c", [tmp_path / "good", tmp_path / "bad"])
    with pytest.raises(CheckpointError, match="missing does not exist"):
        load("c", [tmp_path / "missing"])
    assert arenas == []


def cut_after_header(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Each file loses its last `nbytes` bytes once its header has been read."""
    real = sources.read_header_unless_empty

    def read_and_cut(path: Path) -> SafetensorsHeader | None:
        header = real(path)
        os.truncate(path, Path(path).stat().st_size - nbytes)
        return header

    monkeypatch.setattr(sources, "read_header_unless_empty", read_and_cut)


def test_truncated_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arenas: Arenas) -> None:
    sharded_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    cut_after_header(monkeypatch, 1)
    with pytest.raises(CheckpointFormatError, match="truncated while reading tensor 'layers") as caught:
        load("c", files)
    assert "model-0000" in str(caught.value)
    # While the error is still held: its traceback must keep nothing.
    assert len(arenas) == 1
    assert arenas[0]() is None
    assert not open_files() & {str(file) for file in files}


def test_a_disk_that_fails_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arenas: Arenas
) -> None:
    """The kernel says EIO, as of a bad sector: nothing is kept, though the error has a cause with frames."""
    save_file({"w": torch.zeros(5000)}, tmp_path / "a")
    real = os.preadv

    def preadv(descriptor: int, targets: list[memoryview], offset: int) -> int:
        with open("/proc/self/mem", "rb") as nothing:  # whose first page cannot be read
            return real(nothing.fileno(), targets, 0)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"a cannot be read at byte .*: Input/output error") as caught:
        load("c", [tmp_path / "a"])
    assert caught.value.__cause__ is not None
    assert arenas[0]() is None
    assert str(tmp_path / "a") not in open_files()


def test_removed_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arenas: Arenas) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "a")
    real = sources.read_header_unless_empty

    def read_and_remove(path: Path) -> SafetensorsHeader | None:
        header = real(path)
        Path(path).unlink()
        return header

    monkeypatch.setattr(sources, "read_header_unless_empty", read_and_remove)
    with pytest.raises(CheckpointError, match=r"a cannot be read at byte .*: No such file"):
        load("c", [tmp_path / "a"])
    assert arenas[0]() is None


def test_a_copy_that_fails_frees_everything(monkeypatch: pytest.MonkeyPatch, arenas: Arenas) -> None:
    def failing(copy: tensor_copies.Copy, arena: HostArena) -> None:
        view = arena.view(copy.arena_offset, copy.nbytes)
        raise RuntimeError(f"device lost, {view.numel()}")

    monkeypatch.setattr(tensor_copies.Copy, "run", failing)
    with pytest.raises(RuntimeError, match="device lost") as caught:
        load("c", named_tensors={"w": torch.zeros(1000)})
    assert arenas[0]() is None
    assert caught.value is not None


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_engine.checkpoint.arena.available_host_memory", lambda: 100)
    with pytest.raises(HostMemoryError, match="400 bytes"):
        load("c", named_tensors={"w": torch.zeros(100)})


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_keyboard_interrupt(
    delay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arenas: Arenas
) -> None:
    """Ctrl-C while a thread reads: it finishes its piece, no more are begun, nothing is held.

    Without a delay it comes while the main thread is still starting threads.
    """
    sharded_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    real, calls, at_work = os.preadv, 0, 0

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls, at_work
        calls += 1
        at_work += 1
        if calls == 1:
            threading.Event().wait(delay)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        threading.Event().wait(0.2)
        at_work -= 1
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(file_reads.os, "preadv", slow)
    monkeypatch.setattr(file_reads, "PIECE_NBYTES", 50)
    with pytest.raises(KeyboardInterrupt):
        load("c", files, threads=1)
    assert at_work == 0
    assert calls < 3
    assert arenas[0]() is None
    assert not open_files() & {str(file) for file in files}


def test_files_are_opened_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded_checkpoint(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    opened: list[str] = []

    class Counted(file_reads.FileIO):
        def __init__(self, path: Path, mode: str) -> None:
            opened.append(str(path))
            super().__init__(path, mode)

    monkeypatch.setattr(file_reads, "FileIO", Counted)
    monkeypatch.setattr(file_reads, "PIECE_NBYTES", 50)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = load("c", files)
    assert len(os.listdir("/proc/self/fd")) == before
    assert sorted(opened) == [str(file) for file in files]
    checkpoint.close()
