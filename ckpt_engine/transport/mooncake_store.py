"""mooncake's TransferEngine as a `P2PStore`.

Which transport mooncake takes does not follow from the protocol that it is given, but from its build and its
environment (`mooncake_environment`). So it is forced there, and what peers are told by the engine's own
description of itself is what counts: another transport than the wanted one is an error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import struct
import sys
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from ckpt_engine.errors import P2PError, P2PUnavailable
from ckpt_engine.settings import Settings
from ckpt_engine.transport.framing import receive
from ckpt_engine.transport.mooncake_environment import prepare_environment, wanted_transport
from ckpt_engine.transport.p2p import Piece
from ckpt_engine.transport.verbs import list_devices

logger = logging.getLogger(__name__)

PIECE_NBYTES = 64 * 1024 * 1024
"""Largest of one transfer."""
START_TRIES = 8
"""mooncake looks for free ports, and may find two of them taken by others meanwhile."""
DESCRIBE_SECONDS = 10.0
_METADATA_REQUEST = 1
_TRANSPORTS = {"ascend": "ascend_direct"}
"""Where an engine's description has another name than the protocol argument."""
_NPU_WHEEL = "mooncake-transfer-engine-npu"
_NEEDS = (
    "mooncake-transfer-engine and libibverbs",
    "pip install 'ckpt-engine[p2p]', and install libibverbs1 with the system's packages",
)
_NEEDS_ON_NPUS = (
    f"{_NPU_WHEEL} and CANN's libraries",
    "pip install 'ckpt-engine[p2p-npu]', and source CANN's set_env.sh",
)
"""What, and how to get it. All wheels hold the package `mooncake`: one stands in another's place."""
_GLOG = re.compile(r"^(?:[IWEF]\d{4} |WARNING: Logging before InitGoogleLogging)")


def start_mooncake(
    settings: Settings, host_ip: str, device_type: str, rdma_devices: Sequence[str]
) -> MooncakeStore:
    """A store of its own engine, as `p2p.make_p2p_store`.

    Raises:
        P2PUnavailable: mooncake or its libraries are missing, it cannot start, or takes another transport.
    """
    efa = {device.name for device in list_devices() if device.is_efa} if rdma_devices else set()
    wanted = wanted_transport(device_type, rdma_devices, efa, settings.p2p_transport)
    prepare_environment(wanted, settings.stall_timeout, ipv6=":" in host_ip)
    try:  # some of the variables are read when it is imported
        from mooncake.engine import TransferEngine  # type: ignore[import-untyped]
    except ImportError as error:
        needs, remedy = _NEEDS_ON_NPUS if device_type == "npu" else _NEEDS
        raise P2PUnavailable(f"P2P needs {needs} ({error}): {remedy}") from error
    devices = ",".join(rdma_devices) if wanted in ("rdma", "efa") else ""
    said = ""
    for _ in range(START_TRIES):
        with _stderr() as lines:
            engine = TransferEngine()
            failed = engine.initialize(host_ip, "P2PHANDSHAKE", wanted, devices)
        said = "".join(lines)
        logger.debug("mooncake starts at %s: %s", host_ip, said)
        if not failed:
            port = engine.get_rpc_port()
            address = f"[{host_ip}]:{port}" if ":" in host_ip else f"{host_ip}:{port}"
            taken = _transport_of(host_ip, port, wanted)
            if taken != wanted:
                raise P2PUnavailable(
                    f"P2P should go over {wanted}, but mooncake takes {taken} here: {_other_wheel(wanted)}"
                )
            return MooncakeStore(engine, address, taken)
    raise P2PUnavailable(f"mooncake cannot start at {host_ip} ({wanted}): {said.strip()}")


class MooncakeStore:
    """On an engine that has started, which it owns. Any thread may call anything."""

    def __init__(self, engine: Any, address: str, transport: str) -> None:  # noqa: ANN401 - mooncake's
        self.address = address
        self.transport = transport
        # The engine ends with its last reference: only who has the lock may use it.
        self._engine: Any = engine
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def register(self, address: int, nbytes: int) -> None:
        with self._engine_or_error() as engine:
            # The batched call: the other one keeps Python's lock while the driver pins the pages.
            code = engine.batch_register_memory([address], [nbytes])
            if code:
                raise P2PError(
                    f"mooncake cannot register {nbytes} bytes of memory over {self.transport} (code {code}): "
                    + (
                        "some of it is registered already"
                        if code == -7
                        else "is there a limit on locked memory (ulimit -l)?"
                    )
                )
            self._starts.insert(bisect_right(self._starts, address), address)
            self._sizes[address] = nbytes

    def unregister(self, address: int) -> None:
        with self._engine_or_error() as engine:
            if address in self._sizes:
                engine.batch_unregister_memory([address])
                self._starts.remove(address)
                del self._sizes[address]

    def start_read(self, peer: str, pieces: Sequence[Piece]) -> MooncakeRead:
        with self._engine_or_error() as engine:
            for piece in pieces:
                # RDMA needs it; TCP would write anywhere, and no test on TCP would ever find out.
                if not self._covers(piece.local, piece.nbytes):
                    raise P2PError(f"{piece.nbytes} bytes at {piece.local:#x} are not registered here")
            read = MooncakeRead(self, peer, sum(piece.nbytes for piece in pieces))
            for piece in pieces:
                for start in range(0, piece.nbytes, PIECE_NBYTES):
                    nbytes = min(PIECE_NBYTES, piece.nbytes - start)
                    number = engine.batch_transfer_async_read(
                        peer, [piece.local + start], [piece.remote + start], [nbytes]
                    )
                    if number == 0:
                        read.fail("it is gone, or cannot be reached")
                        return read
                    read.numbers.append(number)
            return read

    def status(self, number: int) -> int:
        """1: done; 0: under way; below: failed. mooncake forgets an id that ended: not to be asked again."""
        with self._engine_or_error() as engine:
            return int(engine.transfer_check_status(number))

    def close(self) -> None:
        # Nobody else keeps the engine: it ends its threads and connections when it goes.
        with self._lock:
            self._engine = None
            self._starts.clear()
            self._sizes.clear()

    @contextlib.contextmanager
    def _engine_or_error(self) -> Iterator[Any]:
        with self._lock:
            if self._engine is None:
                raise P2PError(f"the P2P store {self.address} is closed")
            yield self._engine

    def _covers(self, address: int, nbytes: int) -> bool:
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return False
        start = self._starts[place]
        return address + nbytes <= start + self._sizes[start]


class MooncakeRead:
    """`numbers`: mooncake's ids of the transfers that have not ended."""

    def __init__(self, store: MooncakeStore, peer: str, nbytes: int) -> None:
        self.numbers: list[int] = []
        self._store = store
        self._peer = peer
        self._nbytes = nbytes
        self._failure: str | None = None

    def fail(self, why: str) -> None:
        self._failure = why

    def poll(self) -> bool:
        for number in list(self.numbers):
            if self._failure is not None:
                break
            status = self._store.status(number)
            if status:
                self.numbers.remove(number)
                if status != 1:
                    self.fail(f"it is gone, cut off, stopped, or has not that memory (status {status})")
        if self._failure is not None:
            raise P2PError(
                f"a read of {self._nbytes} bytes from {self._peer} over {self._store.transport} failed: "
                f"{self._failure}. Bytes of it may still come until the store is closed"
            )
        return not self.numbers


def _other_wheel(wanted: str) -> str:
    if wanted == "ascend_direct":  # on NPUs tcp is never asked for
        return f"pip uninstall the wheel of mooncake that is here, and pip install {_NPU_WHEEL}"
    return f"install the wheel of mooncake for {wanted}, or set MC_FORCE_TCP=1 to go over tcp"


def _transport_of(host_ip: str, port: int, wanted: str) -> str:
    """What the engine at this port tells its peers; `wanted` where this version cannot understand it."""
    try:
        protocol = str(describe(host_ip, port)["protocol"])
    except (OSError, ValueError, KeyError, struct.error) as error:
        logger.warning("this mooncake does not say what it uses (%s): taken for %s", error, wanted)
        return wanted
    return _TRANSPORTS.get(protocol, protocol)


def describe(host_ip: str, port: int) -> dict[str, Any]:
    """An engine's description of itself, as its peers get it: protocol, devices, registered memory.

    A frame is its length (8 bytes, little endian), which counts the kind (1 byte) too, and JSON.
    """
    body = bytes([_METADATA_REQUEST]) + b"{}"
    with socket.create_connection((host_ip, port), timeout=DESCRIBE_SECONDS) as sock:
        sock.sendall(struct.pack("<Q", len(body)) + body)
        (nbytes,) = struct.unpack("<Q", _all_of(sock, 8))
        if not 1 < nbytes <= 1 << 20:
            raise ValueError(f"an answer of {nbytes} bytes")
        answer = _all_of(sock, nbytes)
    found = json.loads(answer[1:])
    if not isinstance(found, dict):
        raise ValueError("no description")
    return found


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """What is written to this process's stderr meanwhile: mooncake logs there, also when all is well.

    What others write meanwhile is passed on.
    """
    lines: list[str] = []
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(kept, 2)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines(keepends=True):
                if _GLOG.match(line):
                    lines.append(line)
                else:
                    sys.stderr.write(line)
    finally:
        os.close(kept)


def _all_of(sock: socket.socket, nbytes: int) -> bytes:
    received = receive(sock, nbytes)
    if len(received) < nbytes:
        raise ConnectionError(f"the answer ends after {len(received)} of {nbytes} bytes")
    return received
