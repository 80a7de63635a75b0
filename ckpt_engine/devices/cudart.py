"""The few calls of CUDA's runtime that torch does not offer: plain device memory and its IPC handles.

Slots must not come from torch's caching allocator: its blocks are parts of larger allocations, whose
handle would export a stranger's memory too, and under `expandable_segments` they cannot be exported at all.
The library is the one that torch has loaded, so device, streams and errors are shared with it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from ckpt_engine.errors import DeviceError

IPC_HANDLE_NBYTES = 64
HOST_REGISTER_READ_ONLY = 8
_HOST_REGISTER_PORTABLE = 1
_IPC_LAZY_ENABLE_PEER_ACCESS = 1
_ALREADY_MAPPED = 208


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_NBYTES),)


@functools.cache
def _library() -> ctypes.CDLL:
    """The runtime that this process has loaded.

    Raises:
        DeviceError: there is none (a build of torch without CUDA).
    """
    torch.cuda.init()
    paths = {
        line.split(maxsplit=5)[5].strip()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libcudart" in line and len(line.split(maxsplit=5)) == 6
    }
    if not paths:
        raise DeviceError("torch has loaded no libcudart: this build of torch has no CUDA")
    library = ctypes.CDLL(min(paths))
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _IpcHandle, ctypes.c_uint)
    for name in ("cudaFree", "cudaHostUnregister", "cudaIpcCloseMemHandle"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.cudaDeviceGetPCIBusId.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    library.cudaMalloc.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
    library.cudaIpcGetMemHandle.argtypes = (ctypes.POINTER(_IpcHandle), ctypes.c_void_p)
    library.cudaHostRegister.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    return library


def _check(code: int, what: str) -> None:
    if code:
        library = _library()
        text = library.cudaGetErrorString(code).decode()
        # Else the next call of torch's would report this error as its own.
        library.cudaGetLastError()
        raise DeviceError(f"{what}: {text} (cudaError {code})")


def _on(index: int) -> ctypes.CDLL:
    library = _library()
    _check(library.cudaSetDevice(index), f"choosing cuda:{index}")
    return library


def pci_address(index: int) -> str:
    """Where cuda:`index` is on the host's PCI buses, such as "0000:1b:00.0"."""
    text = ctypes.create_string_buffer(32)
    _check(
        _library().cudaDeviceGetPCIBusId(text, len(text), index),
        f"asking for the PCI address of cuda:{index}",
    )
    return text.value.decode().lower()


def malloc(index: int, nbytes: int) -> int:
    """Device memory on cuda:`index`, outside torch's allocator; its address."""
    pointer = ctypes.c_void_p()
    with torch.cuda.device(index):
        _check(_on(index).cudaMalloc(ctypes.byref(pointer), nbytes), _allocating(nbytes))
    assert pointer.value is not None
    return pointer.value


def _allocating(nbytes: int) -> str:
    return (
        f"allocating {nbytes} bytes (the engine left less than was free a moment ago: leave it less, or "
        "make CKPT_ENGINE_SLOT_MIB or PS_MEM_FRACTION smaller)"
    )


def free(index: int, address: int) -> None:
    with torch.cuda.device(index):
        _check(_on(index).cudaFree(address), "freeing device memory")


def ipc_handle(index: int, address: int) -> bytes:
    """64 bytes with which another process maps the allocation that begins at `address`."""
    handle = _IpcHandle()
    with torch.cuda.device(index):
        _check(_on(index).cudaIpcGetMemHandle(ctypes.byref(handle), address), "exporting device memory")
    return ctypes.string_at(ctypes.byref(handle), IPC_HANDLE_NBYTES)


def open_ipc_handle(index: int, handle: bytes) -> int:
    """Maps another process's allocation on cuda:`index`; its address here."""
    if len(handle) != IPC_HANDLE_NBYTES:
        raise DeviceError(f"an IPC handle of {len(handle)} bytes, not {IPC_HANDLE_NBYTES}")
    theirs = _IpcHandle()
    ctypes.memmove(ctypes.byref(theirs), handle, IPC_HANDLE_NBYTES)
    pointer = ctypes.c_void_p()
    with torch.cuda.device(index):
        code = _on(index).cudaIpcOpenMemHandle(ctypes.byref(pointer), theirs, _IPC_LAZY_ENABLE_PEER_ACCESS)
        if code == _ALREADY_MAPPED:
            raise DeviceError("this process has mapped that ring already: the last update did not release it")
        _check(code, f"mapping the ring on cuda:{index}")
    assert pointer.value is not None
    return pointer.value


def close_ipc_handle(index: int, address: int) -> None:
    with torch.cuda.device(index):
        _check(_on(index).cudaIpcCloseMemHandle(address), "unmapping the ring")


def host_register(index: int, address: int, nbytes: int, *, read_only: bool) -> None:
    """Pins host memory: page-aligned start, pages populated. For all devices of this process."""
    flags = _HOST_REGISTER_PORTABLE | (HOST_REGISTER_READ_ONLY if read_only else 0)
    with torch.cuda.device(index):
        _check(_on(index).cudaHostRegister(address, nbytes, flags), f"pinning {nbytes} bytes of host memory")


def host_unregister(index: int, address: int) -> None:
    with torch.cuda.device(index):
        _check(_on(index).cudaHostUnregister(address), "unpinning host memory")
