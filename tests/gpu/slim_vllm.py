"""Makes an archive of vLLM small enough to be carried to a GPU machine without network, for test_gpu_vllm.py.

    python -m tests.gpu.slim_vllm vllm-0.26.0-cp38-abi3-manylinux_2_28_x86_64.whl vllm.tar.xz --arch 90

The wheel is the one whose torch that machine has (`pip download --no-deps vllm==...`). Left out are libraries
that the tests do not call, and of the GPU code in the others all that is not for `--arch`: its bytes become
zeros, which compress to nothing, and no address changes. There, unpack it, put the folder `site` and this
repository on PYTHONPATH, install what that vLLM asks for and the machine lacks (`--add DIRECTORY` takes along
what `pip install --target --no-deps` put there), set VLLM_USE_FLASHINFER_SAMPLER=0, and run the test. Needs
`strip`.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

MAGIC = 0xBA55ED50
"""Of a fat binary: header size (u16 at 6) and the size of its entries (u64 at 8) follow."""
ELF = 2
"""The kind of an entry that is machine code. Its header has its own size (u32 at 4), that of the payload (u64
at 8) and the architecture, such as 90 (u32 at 28)."""
LEFT_OUT = (
    *("vllm/vllm-rs", "vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*"),
    *("vllm/third_party/tml_fa4/*", "vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/vllm_flash_attn/cute/*"),
    *("*.hpp", "*.cuh", "*.h", "vllm/benchmarks/*"),
)
ENTRY_POINTS = "[vllm.general_plugins]\nckpt_engine = ckpt_engine_vllm.plugin:register\n"


def fat_sections(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the fat binaries of a 64-bit ELF file lie: begin and end, in bytes."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
    base = sections[names][4]
    for name, _, _, _, offset, nbytes in sections:
        if b"nv_fatbin" in data[base + name : data.index(b"\0", base + name)]:
            yield offset, offset + nbytes


def payloads(data: bytes) -> Iterator[tuple[int, int, bool, int]]:
    """Of each entry: begin and end of its payload, whether it is machine code, and the architecture."""
    for begin, end in fat_sections(data):
        place = begin
        while place < end - 16:
            magic, _, header, nbytes = struct.unpack_from("<IHHQ", data, place)
            if magic != MAGIC:
                place += 8  # padding
                continue
            place, last = place + header, place + header + nbytes
            while place < last:
                kind, _, own, size = struct.unpack_from("<HHIQ", data, place)
                (arch,) = struct.unpack_from("<I", data, place + 28)
                yield place + own, place + own + size, kind == ELF, arch
                place += own + size


def without_others(data: bytes, arch: int) -> tuple[bytes, int]:
    """`data` with zeros for the GPU code that is not machine code for `arch`; the bytes that stay."""
    slim, kept = bytearray(data), 0
    for begin, end, is_code, of in payloads(data):
        if is_code and of == arch:
            kept += end - begin
        else:
            slim[begin:end] = bytes(end - begin)
    return bytes(slim), kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("archive", type=Path, help="what to write, a .tar.xz")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, such as 90 for an H100")
    parser.add_argument("--add", type=Path, help="a directory of packages to take along")
    parser.add_argument("--preset", type=int, default=6, help="of xz, 0 (fast) to 9 (small)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        site = Path(temporary)
        with zipfile.ZipFile(options.wheel) as wheel:
            kept = [name for name in wheel.namelist() if not any(fnmatch(name, each) for each in LEFT_OUT)]
            wheel.extractall(site, kept)
        for library in sorted(site.rglob("*.so")):
            subprocess.run(["strip", "--strip-all", str(library)], check=True)
            data, nbytes = without_others(library.read_bytes(), options.arch)
            library.write_bytes(data)
            name, sizes = library.relative_to(site), (nbytes / 1e6, len(data) / 1e6)
            print(f"{name}: {sizes[0]:.1f} MB of GPU code, of {sizes[1]:.1f} MB in all")  # noqa: T201
        if options.add is not None:
            shutil.copytree(options.add, site, dirs_exist_ok=True)
        info = site / "ckpt_engine-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ckpt-engine\nVersion: 0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        with tarfile.open(options.archive, "w:xz", preset=options.preset) as archive:
            archive.add(site, "site")
    print(f"{options.archive}: {options.archive.stat().st_size / 1e6:.1f} MB")  # noqa: T201


if __name__ == "__main__":
    main()
