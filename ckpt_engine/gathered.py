"""Who holds what: the metas of each gathered or loaded checkpoint, and whether they are still true."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ckpt_engine.errors import CheckpointError, ConfigError, UnknownCheckpointError
from ckpt_engine.gathering import Gathered
from ckpt_engine.metadata import Metas, content_digest, distinct, metas_to_json, topology
from ckpt_engine.planning.sources import Sources, check_fleets

logger = logging.getLogger(__name__)

REMEMBERED = 64
"""Of how many checkpoints, the latest, it is remembered who held a part."""


@dataclass(kw_only=True, frozen=True)
class Senders:
    """Where the bytes of an update come from.

    `metas`: what its members hold. `outside`: what ranks of this fleet hold that take no part. `fleets`:
    other fleets' metas, any of which will do. `digest`: of all these, alike on every member; `content`: of
    the weights; `layout`: of what a plan follows from, so that it can be used again; empty where it cannot.
    """

    metas: Metas
    outside: Metas
    fleets: tuple[Metas, ...]
    digest: str
    content: str
    layout: str = ""

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(
            _tensors(self.metas) | _tensors(self.outside) | set().union(*map(_tensors, self.fleets))
        )

    def digests(self, names: Iterable[str]) -> list[bytes]:
        """Of these tensors' bytes.

        Raises:
            CheckpointError: one was registered without.
        """
        known = {
            tensor.name: tensor.digest
            for metas in (self.metas, self.outside, *self.fleets)
            for held in metas.values()
            for buffer in held.buffers
            for tensor in buffer.tensors
            if tensor.digest
        }
        wanted = list(names)
        without = next((name for name in wanted if name not in known), None)
        if without is not None:
            raise CheckpointError(
                f"verify: tensor {without!r} was registered without a digest: set CKPT_ENGINE_VERIFY, or "
                "give register_checkpoint(digests=True), on every rank that holds a share, and gather again"
            )
        return [bytes.fromhex(known[name]) for name in wanted]

    @property
    def has_sources(self) -> bool:
        """Whether anything must be read by P2P."""
        return bool(self.outside or self.fleets)

    def sources(self, first_fleet: int = 0, found: Sequence[Metas] = ()) -> Sources:
        """What is to be read, from fleet `first_fleet` where it can be.

        Args:
            found: more fleets, behind these, that hold the same weights.
        """
        return (
            Sources.of_fleets([*self.fleets, *found], first_fleet) if self.fleets else Sources(self.outside)
        )


@dataclass(kw_only=True, frozen=True)
class _Known:
    """`epoch`: of this rank's share when it gathered; `layouts`: digests of what each rank holds, without
    its epoch; `fleets`: other fleets' metas, if they were loaded; `joined`: those that were before this
    fleet gathered the same weights itself."""

    epoch: str = ""
    metas: Metas
    layouts: Mapping[int, str] = field(default_factory=dict)
    fleets: tuple[Metas, ...] = ()
    joined: tuple[Metas, ...] = ()

    @cached_property
    def digest(self) -> str:
        if self.fleets:
            return _digest_of(*map(metas_to_json, self.fleets))
        heads = {rank: held.model_copy(update={"buffers": ()}) for rank, held in self.metas.items()}
        return _digest_of(metas_to_json(heads), json.dumps(sorted(self.layouts.items())).encode())

    @cached_property
    def content(self) -> str:
        # Whichever fleet is read, the weights are the same: that was checked when they were loaded.
        metas = Sources.of_fleets(self.fleets).planned if self.fleets else self.metas
        return content_digest(metas.values())


@dataclass(kw_only=True, frozen=True)
class _Holders:
    """Ranks that hold a part, and ranks that can be read by P2P (and so can read)."""

    holding: frozenset[int]
    readable: frozenset[int]

    def needed_with(self, wanted: Collection[int]) -> set[int]:
        """Of the others, those that must take part: nobody can read what they hold."""
        others = self.holding - set(wanted)
        return set(others - self.readable if self.readable & set(wanted) else others)


class GatheredMetas:
    """`shown`: what was gathered or loaded last; `fleets`: all who hold that, as far as this rank knows,
    this fleet first if it does; `topology`: the senders' side of what is shown."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._by_name: dict[str, _Known] = {}
        self._holders: dict[str, _Holders] = {}
        self.shown: Metas = {}
        self.fleets: tuple[Metas, ...] = ()
        self.topology: dict[str, set[int]] = {}

    def put(self, name: str, gathered: Gathered, lost: dict[int, str], registered: Sequence[str]) -> None:
        """Keeps what all ranks said that they hold.

        Args:
            lost: ranks that are gone, and why.
            registered: names on this rank, for the error's text.

        Raises:
            UnknownCheckpointError: no rank holds anything under this name.
            ConfigError: two ranks have the same device UUID.
            CheckpointError: ranks are gone, and with them tensors that nobody else holds, or may have.
        """
        metas = gathered.metas
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
        joined = self._joined_before(name, metas)
        self._by_name[name] = _Known(
            epoch=metas[self._rank].epoch, metas=metas, layouts=gathered.layouts, joined=joined
        )
        self._holders.pop(name, None)
        self._holders[name] = _Holders(
            holding=frozenset(rank for rank, held in metas.items() if held.tensor_count),
            readable=frozenset(rank for rank, held in metas.items() if held.readable),
        )
        while len(self._holders) > REMEMBERED:
            del self._holders[next(iter(self._holders))]
        self._show([metas, *joined])

    def load(self, fleets: Sequence[Metas]) -> str:
        """Keeps other fleets' metas of one checkpoint, in place of what was gathered of it; its name.

        Raises:
            CheckpointError: it cannot be joined by these metas.
        """
        name = check_fleets(fleets)
        fleets = distinct(fleets)
        self._by_name[name] = _Known(metas={}, fleets=tuple(fleets))
        self._show(fleets)
        return name

    def _joined_before(self, name: str, metas: Metas) -> tuple[Metas, ...]:
        """The fleets that this one joined, and whose weights it has kept: whoever joins it may read them as
        well."""
        known = self._by_name.get(name)
        fleets = (*known.fleets, *known.joined) if known is not None else ()
        try:
            if fleets:
                check_fleets([metas, *fleets])
        except CheckpointError:
            return ()  # other weights by now
        return fleets

    def _check_without(self, lost: dict[int, str], name: str, metas: Metas) -> None:
        known = self._by_name.get(name)
        before = known.metas if known is not None else {}
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

    def _show(self, fleets: Sequence[Metas]) -> None:
        self.shown, self.fleets, self.topology = fleets[0], tuple(fleets), topology(fleets[0])

    def forget(self, name: str) -> None:
        """Its metas; a rank that asks for an update all the same knows whom to tell that it cannot."""
        self._by_name.pop(name, None)

    @property
    def names(self) -> list[str]:
        """What was gathered or loaded."""
        return list(self._by_name)

    def members(self, name: str, wanted: Sequence[int], *, all_ranks: bool = False) -> tuple[int, ...]:
        """Those who are to be updated, and those who must give what nobody can read; the same on every rank.

        An owner outside `wanted` is read by P2P if it published an address, and one of `wanted` did.

        Args:
            all_ranks: `wanted` are all ranks, because the caller named none.

        Raises:
            ConfigError: other fleets' metas were loaded, and no ranks named.
        """
        known = self._by_name.get(name)
        if known is not None and known.fleets:
            if all_ranks:
                raise ConfigError(
                    f"{name!r} is held by another fleet, whose metas were loaded: say which ranks of this "
                    "one are to be updated, with ranks=[...]"
                )
            return tuple(sorted(wanted))
        holders = self._holders.get(name)
        members = {*wanted, *(holders.needed_with(wanted) if holders is not None else ())}
        return tuple(sorted(members))

    def of(self, name: str, epoch: str, registered: Sequence[str], members: Collection[int]) -> Senders:
        """Where a checkpoint's bytes come from in an update of `members`.

        Args:
            epoch: that of this rank's share as it is now, empty if there is none.

        Raises:
            UnknownCheckpointError: neither gathered nor loaded.
            CheckpointError: gathered before this rank's share was made.
        """
        known = self._by_name.get(name)
        if known is None:
            raise UnknownCheckpointError(
                f"{name!r} is registered but not gathered: call gather_metas first"
                if name in registered
                else f"{name!r} is neither registered nor gathered on rank {self._rank}, which has "
                + _listed(registered)
            )
        if known.fleets:
            return Senders(
                metas={}, outside={}, fleets=known.fleets, digest=known.digest, content=known.content
            )
        if epoch != known.epoch:
            raise CheckpointError(f"{name!r} changed on rank {self._rank} since gather_metas: call it again")
        metas = {rank: held for rank, held in known.metas.items() if rank in members}
        outside = {
            rank: held for rank, held in known.metas.items() if rank not in members and held.tensor_count
        }
        layouts = sorted((rank, known.layouts[rank]) for rank in metas)
        return Senders(
            metas=metas,
            outside=outside,
            fleets=(),
            digest=known.digest,
            content=known.content,
            layout="" if outside else _digest_of(json.dumps(layouts).encode()),
        )


def _digest_of(*texts: bytes) -> str:
    return hashlib.sha256(b"\n".join(texts)).hexdigest()


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
