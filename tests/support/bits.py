"""Odd tensors, and a rank under torchrun that puts them into a real worker: from files, then from tensors.

What the worker holds after each goes to `{out}/rank-{r}.json`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch

from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint import split_checkpoint
from ckpt_engine.metadata import DTYPE_NBYTES
from tests.support.rank import Worker

Tensors = dict[str, torch.Tensor]

LARGE_NBYTES = 3 * 1024 * 1024
MAX_BUCKET_GB = "0.0005"
"""PS_MAX_BUCKET_SIZE_GB: half a MiB, a sixth of the large tensor."""
SMALL_COUNT = 5000
NAMES_SEED = 20261126
TIMEOUT = 120.0

NAMES = [
    " ",
    ".",
    "/etc/passwd",
    "\x00",
    "a\x00b",
    "line\nline\r\n",
    "tab\tbell\x07escape\x1b[31m",
    "\x7f\x80\x9f",
    '"quoted" \\ back',
    "{json: [1]}",
    "é",  # one code point
    "e\u0301",  # looks the same
    "ﬁ",
    "ß",
    "模型.层.权重",
    "\u0648\u0632\u0646\u200f\u0637",  # right to left
    "\u202ebackwards",
    "\u2028\u2029",
    "\ufeffmark",
    "\ufffd\ufffe\uffff",
    "👩\u200d👩\u200d👧",
    "\U00010000\U0010fffd\U0010ffff",
    "x" * 3000,
    "́" * 500,
]


def any_names(count: int) -> list[str]:
    """`NAMES`, and strings of any Unicode scalar values, always the same."""
    source = random.Random(NAMES_SEED)
    names = set(NAMES)
    while len(names) < len(NAMES) + count:
        size = source.randint(1, 12)
        below = source.choice([0x80, 0x800, 0xD800, 0x110000])
        codes = [source.randrange(below) for _ in range(size)]
        names.add("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000) or "empty")
    return sorted(names)


def random_bits(source: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits that the dtype can hold, NaNs of every kind among them."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=source, dtype=torch.uint8).bool()
    data = torch.randint(0, 256, (count * dtype.itemsize,), generator=source, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def make(seed: int) -> Tensors:
    """What a checkpoint file can hold: every dtype in several shapes, small and large, and odd names."""
    source = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name in sorted(DTYPE_NBYTES):
        dtype = getattr(torch, name)
        for shape in ((), (0,), (3, 0, 5), (1,), (257,), (64, 33), (2, 3, 5, 7)):
            tensors[f"{name}.{'x'.join(map(str, shape)) or 'scalar'}"] = random_bits(source, dtype, *shape)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool):
        tensors[f"large.{dtype}"] = random_bits(source, dtype, LARGE_NBYTES // dtype.itemsize)
    for number in range(SMALL_COUNT):
        tensors[f"small.{number:05}"] = random_bits(source, torch.bfloat16, number % 7)
    for name in any_names(300):
        tensors[f"any.{name}"] = random_bits(source, torch.float32, 3)
    return tensors


def in_memory(seed: int) -> Tensors:
    """The same with other bits, names that files cannot hold, and tensors that are not one run of bytes."""
    source = torch.Generator().manual_seed(~seed & 0xFFFF)
    base = random_bits(source, torch.float16, 60, 40)
    return make(seed + 1) | {
        "__metadata__": random_bits(source, torch.int8, 9),
        "odd.transposed": base.t(),
        "odd.every-third": base[1::3, 5::2],
        "odd.expanded": base[:1].expand(17, 40),
        "odd.offset": random_bits(source, torch.uint8, 1000)[7:],
        "odd.tied": base,
        "odd.parameter": torch.nn.Parameter(torch.randn(5, 5, generator=source)),
    }


def main() -> None:
    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    seen = {}
    worker = Worker(int(os.environ["LOCAL_RANK"]))
    try:
        with ParameterServer(device=os.environ.get("TEST_DEVICE", "cpu")) as ps:

            def update(name: str) -> None:
                ps.gather_metas(name)
                report = ps.update(name, lambda paths: worker.update(paths, None), timeout=TIMEOUT)
                seen[name] = {"digests": worker.last["digests"], "ring_nbytes": report.ring_nbytes}
                seen[name] |= {"tensors": report.tensors, "buckets": report.buckets}
                ps.unregister_checkpoint(name)

            ps.register_checkpoint("files", files=split_checkpoint(out / "files", ps.rank, ps.world_size))
            update("files")
            tensors = in_memory(seed)
            mine = {name: tensors[name] for name in sorted(tensors)[ps.rank :: ps.world_size]}
            ps.register_checkpoint("tensors", named_tensors=mine)
            update("tensors")
            (out / f"rank-{ps.rank}.json").write_text(json.dumps(seen))
    finally:
        worker.close()


if __name__ == "__main__":
    main()
