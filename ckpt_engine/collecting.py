"""Brings the shards of a trainer's state dict to the ranks that are to register them.

Every rank of the parameter servers is the same rank of the trainer. The ranks tell each other what they hold
(`checkpoint.state_dict`), find the same owners (`checkpoint.shares`), and make host memory for what each is
to own. Then a bucket of every owner travels at a time, in one exchange of all ranks, and each shard goes
straight to its place in host memory. Beside its share no rank ever has more of the model than a bucket that
it sends and one that it gets. The group is a private one: a failure leaves nothing undone in the trainer's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import msgspec
import torch
import torch.distributed as dist

from ckpt_engine.checkpoint.shares import Owned, Piece, rounds, share_out
from ckpt_engine.checkpoint.sources import Incoming, Places
from ckpt_engine.checkpoint.state_dict import Held, StateDict, local_of
from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import ConfigError, ErrorRecord, PeerLost, ProtocolError, UpdateTimeout, clear_frames
from ckpt_engine.metadata import DTYPE_NBYTES, align_up
from ckpt_engine.transport.collectives import DeviceGroup, GlooCollectives, Poll, make_own_group
from ckpt_engine.transport.control import Control, Round, error_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BUCKET_NBYTES = 256 * 1024 * 1024
"""What travels to an owner at a time, unless one tensor is larger."""
CAUSE_SECONDS = 0.5
"""How long a rank that lost another one waits for that one's own error."""
_PIECE_ALIGNMENT = 16
"""Of shards in what travels: that of the largest element."""

Done = Callable[[int], object]

logger = logging.getLogger(__name__)


class Collecting:
    """One rank's collections. Keeps their group, and says once which tensors are tied.

    Args:
        release_group: drop it after each.
    """

    def __init__(self, *, release_group: bool) -> None:
        self._release_group = release_group
        self._tied: set[tuple[str, ...]] = set()
        self._group: GlooCollectives | DeviceGroup | None = None
        self._group_name = ""

    @contextmanager
    def collection(
        self, control: Control, checkpoint_name: str, bucket_nbytes: int, deadline: Deadline
    ) -> Iterator[Callable[[Callable[[], StateDict]], Incoming]]:
        """Gives what turns this rank's state dict into what is to be loaded. All ranks call both.

        Whatever is raised inside is told to the other ranks, which wait for this one.
        """
        purpose = f"register_state_dict({checkpoint_name!r}, bucket_nbytes={bucket_nbytes})"
        collection = _Collection(control, purpose, bucket_nbytes, deadline, self._group_of)
        try:
            yield lambda read: collection.incoming(self._said(read()))
        except BaseException as error:
            self.drop_group()  # a member may still wait in it
            collection.give_up(error)
            raise
        finally:
            collection.round.leave()
            if self._release_group:
                self.drop_group()

    def drop_group(self) -> None:
        """Idempotent."""
        group, self._group, self._group_name = self._group, None, ""
        if group is not None:
            group.close()

    def _group_of(
        self, control: Control, round_: Round, device: torch.device, deadline: Deadline, poll: Poll
    ) -> GlooCollectives | DeviceGroup:
        """The kept group, if it is the same for all and of that device's kind; else they make a new one."""
        names = {name.decode() for name in round_.exchange(self._group_name.encode(), deadline).values()}
        if len(names) == 1 and self._group is not None and self._group_name.startswith(f"{device.type}-"):
            return self._group
        self.drop_group()
        name = f"{device.type}-shards-{round_.name}"
        kind = {"cuda": "nccl", "npu": "hccl"}.get(device.type, "gloo")
        place, size, index = control.rank, control.world_size, device.index or 0
        self._group = make_own_group(kind, control.store, name, place, size, index, deadline, poll)
        self._group_name = name
        return self._group

    def _said(self, state: StateDict) -> StateDict:
        for names in state.tied:
            if names not in self._tied:
                self._tied.add(names)
                logger.warning(
                    "state_dict: %s are tied (the same memory): each is registered and sent. To send one "
                    "only, let rename return None for the others",
                    ", ".join(map(repr, names)),
                )
        return state


class _Collection:
    """`round`: the one in which this rank is."""

    def __init__(
        self,
        control: Control,
        purpose: str,
        bucket_nbytes: int,
        deadline: Deadline,
        group_of: Callable[[Control, Round, torch.device, Deadline, Poll], GlooCollectives | DeviceGroup],
    ) -> None:
        self._control = control
        self._purpose = purpose
        self._bucket_nbytes = bucket_nbytes
        self._deadline = deadline
        self._group_of = group_of
        self.round = control.open_round(purpose)

    def give_up(self, error: BaseException) -> None:
        self.round.abort(ErrorRecord.from_exception(error, rank=self._control.rank, stage="register"))

    def incoming(self, state: StateDict) -> Incoming:
        """What this rank is to load, once all ranks have told what they hold."""
        told = self.round.exchange(msgspec.json.encode(state.held), self._deadline)
        held = {rank: _held_of(rank, text) for rank, text in told.items()}
        owned = share_out(held)
        devices = {sharding.device for one in held.values() for sharding in one.shardings}
        if devices:
            _check_default_group(self._control)
        opened = self._control.open_round(f"{self._purpose}: shards", decides=True)
        self.round.leave()
        self.round = opened

        def bring(places: Places, done: Done) -> None:
            try:
                self._bring(owned, state.tensors, _device_of(devices), places, done)
            except BaseException as error:
                clear_frames(error)  # their views would keep the memory
                raise

        return Incoming([one.spec for one in owned if one.owner == self._control.rank], bring)

    def _bring(
        self,
        owned: Sequence[Owned],
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        places: Places,
        done: Done,
    ) -> None:
        if self._control.world_size > 1 and any(one.sharding is not None for one in owned):
            group = self._group_of(self._control, self.round, device, self._deadline, self._decided)
        else:
            self.round.exchange(b"", self._deadline)  # all have their memory
            group = None
        mover = _Mover(self._control.rank, self._control.world_size, tensors, device, group)
        try:
            with torch.no_grad():
                for bucket in rounds(owned, self._bucket_nbytes):
                    mover.move(bucket, places, self._deadline, self._decided)
                    done(sum(one.spec.nbytes for one in bucket if one.owner == self._control.rank))
        except PeerLost:
            # A rank that fails drops its group: its own error tells more than the end of that.
            self.round.wait_for_verdict(Deadline.after(CAUSE_SECONDS))
            self._decided()
            raise
        self.round.vote("")
        self.round.wait_for_verdict(self._deadline)
        if not self._decided():
            message = f"{self._purpose}: waited for all ranks to have their shards"
            raise UpdateTimeout(ErrorRecord(error_type="UpdateTimeout", message=message))

    def _decided(self) -> bool:
        """Whether all have voted. Raises UpdateError: a rank failed, or is lost."""
        verdict = self.round.peek()
        if verdict is not None and verdict.record is not None:
            raise error_of(verdict.record)
        return verdict is not None


@dataclass(frozen=True, slots=True)
class _Mover:
    """Moves buckets. `tensors`: this rank's, by name; `device`: where what travels lies; `group`: of all
    ranks, None: nothing travels."""

    rank: int
    world_size: int
    tensors: Mapping[str, torch.Tensor]
    device: torch.device
    group: GlooCollectives | DeviceGroup | None

    def move(self, bucket: Sequence[Owned], places: Places, deadline: Deadline, poll: Poll) -> None:
        """Brings a bucket of each owner into place; `bucket` is the same on all ranks, by owner and name."""
        for one in bucket:
            if one.sharding is not None and one.sharding.whole and self.rank in one.sharding.ranks:
                whole = cast("DTensor", self.tensors[one.spec.name]).full_tensor()
                if one.owner == self.rank:
                    _put(places(one.spec.name), whole)
        sharded = [one for one in bucket if one.sharding is not None and not one.sharding.whole]
        if sharded and self.group is not None:
            self._exchange(self.group, sharded, places, deadline, poll)
        for one in bucket:
            if one.owner != self.rank:
                continue
            if one.sharding is None:
                _put(places(one.spec.name), self.tensors[one.spec.name])
            elif not one.sharding.whole and (own := one.piece_of(self.rank)) is not None:
                _put(places(one.spec.name)[own.slices], local_of(self.tensors[one.spec.name]))
        if self.device.type != "cpu":
            torch.get_device_module(self.device).current_stream(self.device).synchronize()

    def _exchange(
        self,
        group: GlooCollectives | DeviceGroup,
        sharded: Sequence[Owned],
        places: Places,
        deadline: Deadline,
        poll: Poll,
    ) -> None:
        """Sends what others are to own, and puts into place what comes from them."""
        given = [
            (one, piece)
            for one in sharded
            if one.owner != self.rank and (piece := one.piece_of(self.rank)) is not None
        ]
        wanted = [
            (one, piece)
            for one in sharded
            if one.owner == self.rank
            for piece in one.pieces()
            if piece.holder != self.rank
        ]
        to_send = self._lengths((one.owner, _nbytes(one, piece)) for one, piece in given)
        to_get = self._lengths((piece.holder, _nbytes(one, piece)) for one, piece in wanted)
        leaving = torch.empty(sum(to_send), dtype=torch.uint8, device=self.device)
        arriving = torch.empty(sum(to_get), dtype=torch.uint8, device=self.device)
        begin = 0
        for one, piece in given:
            _put(_part(leaving, begin, one, piece), local_of(self.tensors[one.spec.name]))
            begin += _nbytes(one, piece)
        group.exchange(arriving, leaving, to_get, to_send, deadline, poll)
        begins = [sum(to_get[:holder]) for holder in range(self.world_size)]
        for one, piece in wanted:
            _put(places(one.spec.name)[piece.slices], _part(arriving, begins[piece.holder], one, piece))
            begins[piece.holder] += _nbytes(one, piece)

    def _lengths(self, parts: Iterable[tuple[int, int]]) -> list[int]:
        lengths = [0] * self.world_size
        for rank, nbytes in parts:
            lengths[rank] += nbytes
        return lengths


def _check_default_group(control: Control) -> None:
    """DTensors name ranks of torch's default group: they must be those of the parameter servers."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "state_dict: some tensors are DTensors, but this process has no default group of "
            "torch.distributed any more: register before destroy_process_group()"
        )
    theirs, ours = (dist.get_rank(), dist.get_world_size()), (control.rank, control.world_size)
    if theirs != ours:
        raise ConfigError(
            f"state_dict: this is rank {theirs[0]} of {theirs[1]} in torch's default group, and rank "
            f"{ours[0]} of {ours[1]} of the parameter servers: to register shards both must be alike"
        )


def _nbytes(one: Owned, piece: Piece) -> int:
    """Of a shard in what travels."""
    return align_up(piece.elements * DTYPE_NBYTES[one.spec.dtype], _PIECE_ALIGNMENT)


def _part(memory: torch.Tensor, begin: int, one: Owned, piece: Piece) -> torch.Tensor:
    nbytes = piece.elements * DTYPE_NBYTES[one.spec.dtype]
    return memory[begin : begin + nbytes].view(getattr(torch, one.spec.dtype)).view(piece.shape)


def _put(place: torch.Tensor, source: torch.Tensor) -> None:
    """Casts where it must. A device's copy into a place in host memory is only enqueued."""
    place.copy_(source, non_blocking=place.is_contiguous())


def _device_of(kinds: Iterable[str]) -> torch.device:
    """Where what travels lies: on the meshes' device."""
    kind = next((kind for kind in sorted(kinds) if kind != "cpu"), "cpu")
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _held_of(rank: int, text: bytes) -> Held:
    try:
        return msgspec.json.decode(text, type=Held)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ProtocolError(f"rank {rank} is of another version of ckpt-engine: {error}") from None
