"""What ranks tell each other at the start of an update, and what follows from it alike on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

from ckpt_engine.errors import CheckpointError, P2PUnavailable, ProtocolError
from ckpt_engine.update.rank import Rank


class ReadsByP2P(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a rank can read by P2P, where anything is to be read: by which `transport` (empty: it cannot,
    and `problem` says why), through which RDMA device. `first_fleet`: which of several fleets admitted this
    update, `found`: the metas of fleets that had announced themselves, if it is the first member's."""

    transport: str = ""
    problem: str = ""
    rdma_device: str = ""
    first_fleet: int = 0
    found: tuple[str, ...] = ()


class Before(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank would put back if the update fails: `checkpoint` and `version`, which its worker has now,
    from where `digest` says (all empty without a worker). `ready`: of each checkpoint that it has gathered,
    where its bytes would come from now, where they could."""

    checkpoint: str = ""
    version: str = ""
    digest: str = ""
    ready: dict[str, str] = {}


class Introduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's. `free_memory`: bytes that the update may take; `memory_pool`: where from. `handle`: its
    worker's, empty where it only gives what it holds. `token`: a secret of this update, if it is the first
    member's. `p2p`: what it says of reading by P2P. `before`: of an update that restores."""

    host: str
    device_type: str
    device_uuid: str
    memory_pool: str
    handle: str
    peer_path: str
    free_memory: int
    slot_nbytes: int
    slot_count: int
    metas_digest: str
    token: str
    group_name: str
    p2p: ReadsByP2P
    before: Before | None = None


def introduce(
    me: Rank, handle: str, metas_digest: str, token: str, p2p: ReadsByP2P, before: Before | None = None
) -> Introduction:
    """This rank's introduction; `handle`: its worker's."""
    return Introduction(
        host=me.settings.host_id,
        device_type=me.device.type,
        device_uuid=me.device.uuid(),
        memory_pool=me.device.memory_pool(),
        handle=handle,
        peer_path=me.directory.peer_path,
        free_memory=int((me.device.free_memory() + me.buffers.nbytes) * me.mem_fraction),
        slot_nbytes=me.settings.slot_nbytes(me.device.type),
        slot_count=me.settings.slot_count,
        metas_digest=metas_digest,
        token=token,
        group_name=me.group_name,
        p2p=p2p,
        before=before,
    )


@dataclass(kw_only=True, frozen=True)
class Meeting:
    """All members' introductions, by rank, and the round's name."""

    name: str
    by_rank: Mapping[int, Introduction]

    @classmethod
    def of(cls, name: str, blobs: Mapping[int, bytes]) -> Meeting:
        """Raises ProtocolError: an introduction of another version."""
        try:
            by_rank = {
                rank: msgspec.json.decode(blob, type=Introduction) for rank, blob in sorted(blobs.items())
            }
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a rank of another version of ckpt-engine: {error}") from None
        return cls(name=name, by_rank=by_rank)

    def check(self, rank: int) -> None:
        """Looks whether ranks agree about what they are to do.

        Raises:
            ProtocolError: they do not.
            CheckpointError: nor about what would be put back.
        """
        mine = self.by_rank[rank]
        for other, introduction in self.by_rank.items():
            if introduction.metas_digest != mine.metas_digest:
                raise ProtocolError(
                    f"rank {rank} and rank {other} have gathered different metas: call gather_metas on all "
                    "ranks"
                )
            if introduction.device_type != mine.device_type:
                raise ProtocolError(
                    f"rank {rank} has a {mine.device_type} device, rank {other} a {introduction.device_type}"
                )

        self._check_before()

    def _check_before(self) -> None:
        """What would be put back: the same into all workers, and from members that have it."""
        said = {rank: one.before for rank, one in self.by_rank.items() if one.before is not None}
        of_workers = {rank: before for rank, before in said.items() if self.by_rank[rank].handle}
        if not of_workers:
            return
        first, wanted = next(iter(of_workers.items()))
        for rank, before in of_workers.items():
            if (before.checkpoint, before.version) != (wanted.checkpoint, wanted.version):
                raise CheckpointError(
                    "on_failure='restore': the workers have different versions, which one update could not "
                    f"put back: rank {first}'s has {wanted.checkpoint!r} (version {wanted.version!r}), that "
                    f"of rank {rank} {before.checkpoint!r} (version {before.version!r}): update with "
                    "on_failure='raise'"
                )
        for rank, before in said.items():
            digest = before.ready.get(wanted.checkpoint)
            if digest != wanted.digest or (rank in of_workers and before.digest != wanted.digest):
                how = "has not, as" if digest is None else "has gathered otherwise than"
                raise CheckpointError(
                    f"on_failure='restore': rank {rank} {how} rank {first}, what would be put back, "
                    f"{wanted.checkpoint!r} (version {wanted.version!r}): register it and gather it on all "
                    "ranks, or make this update with on_failure='raise'"
                )

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(self.by_rank)

    @property
    def token(self) -> str:
        """A secret of this update, the first member's."""
        return self.by_rank[self.members[0]].token

    @property
    def first_fleet(self) -> int:
        return self.by_rank[self.members[0]].p2p.first_fleet

    @property
    def found(self) -> tuple[str, ...]:
        return self.by_rank[self.members[0]].p2p.found

    def readers(self, transports: Collection[str | None]) -> dict[str, set[int]]:
        """`{rdma_device}@{host}` -> the updated ranks behind it that can read by P2P.

        Args:
            transports: those by which the owners can be read.

        Raises:
            P2PUnavailable: there is none.
        """
        found: dict[str, set[int]] = {}
        problems = []
        for rank, other in self.by_rank.items():
            if not other.handle:
                continue
            if set(transports) == {other.p2p.transport}:
                device = other.p2p.rdma_device or other.p2p.transport
                found.setdefault(f"{device}@{other.host}", set()).add(rank)
            else:
                owners = "/".join(sorted(map(str, transports)))
                problems.append(
                    f"rank {rank}: "
                    + (other.p2p.problem or f"it reads by {other.p2p.transport}, the owners by {owners}")
                )
        if not found:
            raise P2PUnavailable(f"none of the ranks can read by P2P: {'; '.join(problems)}")
        return found

    @property
    def slot_nbytes(self) -> int:
        return min(other.slot_nbytes for other in self.by_rank.values())

    @property
    def slot_count(self) -> int:
        return min(other.slot_count for other in self.by_rank.values())

    @property
    def budget(self) -> int:
        """Bytes that every rank may take: those of the fullest pool, shared by its ranks."""
        pools = [other.memory_pool for other in self.by_rank.values()]
        return min(other.free_memory // pools.count(other.memory_pool) for other in self.by_rank.values())

    @property
    def in_host_memory(self) -> bool:
        """Whether the rings lie in host memory, where ranks of a host can map them."""
        return next(iter(self.by_rank.values())).device_type == "cpu"

    @property
    def devices_shared(self) -> bool:
        """Whether two members have the same device (which nccl refuses)."""
        pools = [other.memory_pool for other in self.by_rank.values()]
        return len(set(pools)) < len(pools)

    @property
    def socket_paths(self) -> list[tuple[str, str]]:
        """`[(device_uuid, handle), ...]` of all workers, by rank."""
        return [(other.device_uuid, other.handle) for other in self.by_rank.values() if other.handle]

    def hosts(self) -> dict[int, str]:
        return {rank: other.host for rank, other in self.by_rank.items()}
