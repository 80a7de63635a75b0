"""Checkpoints in host memory: which files they are, loading them, keeping them by name.

registry = CheckpointRegistry()
registry.register("step-100", files=split_checkpoint("/models/m", rank, world_size))
registry.get("step-100").view(0, 0, 256)
registry.unregister("step-100")
"""

from ckpt_engine.checkpoint.arena import HostArena
from ckpt_engine.checkpoint.file_split import split_files
from ckpt_engine.checkpoint.host_checkpoint import HostCheckpoint, Share
from ckpt_engine.checkpoint.index import (
    FileSelection,
    checkpoint_files,
    describe,
    files_of,
    split_checkpoint,
)
from ckpt_engine.checkpoint.loader import load
from ckpt_engine.checkpoint.npy_file import NpyHeader
from ckpt_engine.checkpoint.pool import ArenaPool
from ckpt_engine.checkpoint.registry import CheckpointRegistry
from ckpt_engine.checkpoint.safetensors_header import HeaderEntry, SafetensorsHeader, read_header
from ckpt_engine.checkpoint.sources import FileSource

__all__ = [
    "ArenaPool",
    "CheckpointRegistry",
    "FileSelection",
    "FileSource",
    "HeaderEntry",
    "HostArena",
    "HostCheckpoint",
    "NpyHeader",
    "SafetensorsHeader",
    "Share",
    "checkpoint_files",
    "describe",
    "files_of",
    "load",
    "read_header",
    "split_checkpoint",
    "split_files",
]
