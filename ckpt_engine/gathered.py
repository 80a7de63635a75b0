"""Who holds what: the metas of each gathered checkpoint, and whether they are still true."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from ckpt_engine.errors import CheckpointError, ConfigError, UnknownCheckpointError
from ckpt_engine.metadata import Metas, metas_to_json, topology

logger = logging.getLogger(__name__)

REMEMBERED = 64
"""Of how many checkpoints, the latest, it is remembered who held a part."""


class GatheredMetas:
    """`shown`: what was gathered or loaded last; `topology`: its senders' side."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._by_name: dict[str, tuple[str, Metas]] = {}
        self._holders: dict[str, set[int]] = {}
        self.shown: Metas = {}
        self.topology: dict[str, set[int]] = {}

    def put(self, name: str, metas: Metas, lost: dict[int, str], registered: Sequence[str]) -> None:
        """Keeps what all ranks said that they hold.

        Args:
            lost: ranks that are gone, and why.
            registered: names on this rank, for the error's text.

        Raises:
            UnknownCheckpointError: no rank holds anything under this name.
            ConfigError: two ranks have the same device UUID.
            CheckpointError: ranks are gone, and with them tensors that nobody else holds, or may have.
        """
        if not any(held.tensor_count for held in metas.values()):
            raise UnknownCheckpointError(
                f"no rank has registered anything as {name!r}; this one holds {_listed(registered)}"
            )
        _check_devices(metas)
        absent = [rank for rank, held in metas.items() if not held.epoch]
        if absent:
            logger.warning("ranks %s have registered nothing as %r, not even an empty share", absent, name)
        if lost:
            self._check_without(lost, name, metas)
        mine = metas[self._rank].epoch
        self._by_name[name] = (mine, metas)
        self._holders.pop(name, None)
        self._holders[name] = {rank for rank, held in metas.items() if held.tensor_count}
        while len(self._holders) > REMEMBERED:
            del self._holders[next(iter(self._holders))]
        self.show(metas)

    def _check_without(self, lost: dict[int, str], name: str, metas: Metas) -> None:
        _, before = self._by_name.get(name, ("", {}))
        missing = sorted(_tensors(before) - _tensors(metas))
        gone = ", ".join(f"rank {rank} ({reason})" for rank, reason in lost.items())
        if not before:
            # It may have held a share of what nobody has seen whole: only the caller can tell.
            raise CheckpointError(
                f"{gone} is gone, and nobody knows whether it held a part of {name!r}: once the ranks that "
                f"are left hold all of it, say so with gather_metas({name!r}, ranks={sorted(metas)})"
            )
        if missing:
            raise CheckpointError(
                f"{gone} is gone, and with it {len(missing)} tensors of {name!r} ({missing[0]!r} first): "
                "register them on the ranks that are left, and gather again"
            )
        logger.warning("%s is gone; update(%r, ranks=%s) goes on without", gone, name, sorted(metas))

    def show(self, metas: Metas) -> None:
        self.shown, self.topology = metas, topology(metas)

    def forget(self, name: str) -> None:
        """Its metas; a rank that asks for an update all the same knows whom to tell that it cannot."""
        self._by_name.pop(name, None)

    def members(self, name: str, wanted: Sequence[int]) -> tuple[int, ...]:
        """Those who are to be updated, and those who hold what they need; the same on every rank.

        Raises:
            ConfigError: this rank is none of them.
        """
        members = sorted({*wanted, *self._holders.get(name, ())})
        if self._rank not in members:
            raise ConfigError(
                f"ranks={list(wanted)}: rank {self._rank} is not among them and holds nothing of {name!r}: "
                "it must not call update"
            )
        return tuple(members)

    def of(self, name: str, epoch: str, registered: Sequence[str]) -> tuple[Metas, str]:
        """A checkpoint's metas and their digest.

        Args:
            epoch: that of this rank's share as it is now, empty if there is none.

        Raises:
            UnknownCheckpointError: not gathered.
            CheckpointError: gathered before this rank's share was made.
        """
        if name not in self._by_name:
            raise UnknownCheckpointError(
                f"{name!r} is registered but not gathered: call gather_metas first"
                if name in registered
                else f"{name!r} is neither registered nor gathered on rank {self._rank}, which has "
                + _listed(registered)
            )
        gathered_epoch, metas = self._by_name[name]
        if epoch != gathered_epoch:
            raise CheckpointError(f"{name!r} changed on rank {self._rank} since gather_metas: call it again")
        return metas, hashlib.sha256(metas_to_json(metas)).hexdigest()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _tensors(metas: Metas) -> set[str]:
    return {tensor.name for held in metas.values() for buffer in held.buffers for tensor in buffer.tensors}


def _check_devices(metas: Metas) -> None:
    seen: dict[str, int] = {}
    for rank, held in sorted(metas.items()):
        other = seen.setdefault(held.device_uuid, rank)
        if other != rank:
            raise ConfigError(
                f"ranks {other} and {rank} both have device {held.device_uuid}: set gpu_count to the "
                "number of ranks on a host, CKPT_ENGINE_HOST_ID to a name of its own for each host, or "
                "CKPT_ENGINE_DEVICE_UUID for each rank"
            )
