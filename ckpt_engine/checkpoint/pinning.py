"""Pins a range of host memory for as long as something owns it, and never a moment longer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from ckpt_engine.errors import HostMemoryError
from ckpt_engine.host_memory import HostMemoryPinner

logger = logging.getLogger(__name__)


def pin_while_alive(
    owner: object,
    mapping: object,
    pinner: HostMemoryPinner,
    address: int,
    nbytes: int,
    *,
    read_only: bool,
) -> Callable[[], object]:
    """Pins bytes [address, address + nbytes) of `mapping`; the result unpins them (once; never raises).

    They are unpinned when `owner` is collected or the interpreter exits, too. `mapping` is kept alive up to
    then: memory that is unmapped while it is pinned would leave the driver with pages of nobody.

    Raises:
        HostMemoryError: they cannot be pinned; the message says why and what to do.
    """
    try:
        pinner.pin(address, nbytes, read_only=read_only)
    except (RuntimeError, OSError) as error:
        raise HostMemoryError(
            f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB) of host memory cannot be pinned: {error}; raise the "
            "limit of locked memory (`ulimit -l unlimited`, for a container `--ulimit memlock=-1`), or "
            "register less on this host"
        ) from error
    return weakref.finalize(owner, _unpin, pinner, address, nbytes, mapping)


def _unpin(pinner: HostMemoryPinner, address: int, nbytes: int, _mapping: object) -> None:
    try:
        pinner.unpin(address)
    except Exception as error:  # noqa: BLE001
        # A lost device can do nothing any more; the memory must still go, and the first error must be seen.
        # Only its text: who keeps log records would keep the traceback, and so the mapping.
        logger.error("%d bytes of host memory could not be unpinned: %s", nbytes, str(error))
