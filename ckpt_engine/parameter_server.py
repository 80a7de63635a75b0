"""The facade: one `ParameterServer` per rank, beside one device.

Typical usage, on every rank of `torchrun`:

    with ParameterServer() as ps:
        ps.register_checkpoint("step-100", files=my_share)
        ps.gather_metas("step-100")
        ps.update("step-100", req_func)
"""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from os import PathLike
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from ckpt_engine.checkpoint import CheckpointRegistry, FileSelection, HostCheckpoint, Share
from ckpt_engine.checkpoint.progress import Progress
from ckpt_engine.checkpoint.state_dict import Cast, Rename, read_state_dict
from ckpt_engine.collecting import BUCKET_NBYTES, Collecting
from ckpt_engine.deadline import Deadline, Timeout, deadline_of
from ckpt_engine.devices import detect_device, device_count, make_device, numa_place_of
from ckpt_engine.errors import (
    CheckpointExistsError,
    ConfigError,
    ErrorRecord,
)
from ckpt_engine.gathered import GatheredMetas
from ckpt_engine.gathering import Gathering, Meetings
from ckpt_engine.ipc.sockets import SocketDirectory
from ckpt_engine.logs import staged
from ckpt_engine.metadata import Metas, RankMetas, metas_from_json, metas_to_json
from ckpt_engine.settings import Verify, load_settings
from ckpt_engine.state import Weights
from ckpt_engine.transport.bootstrap import MeetingPoint, host_ip, own_store, place_of, store_of_caller
from ckpt_engine.transport.vllm_groups import check_custom_dist
from ckpt_engine.update.p2p_ends import P2PEnds
from ckpt_engine.update.rank import Rank
from ckpt_engine.update.request import SocketPaths
from ckpt_engine.update.running import InPlace, Running, Wanted, check_arguments
from ckpt_engine.update.session import UpdateReport, purpose_of

logger = logging.getLogger(__name__)

TEN_MINUTES = timedelta(minutes=10)


class ParameterServer:
    """Holds this rank's share of checkpoints in host memory, and updates the engine's workers with them.

    Args:
        rank, world_size: default: RANK and WORLD_SIZE, else a lone rank.
        auto_pg: make the private groups when they are first needed. False: the caller manages groups;
            ranks meet through torch's default group, made by the caller or by `init_process_group`.
        gpu_count: devices on this host (default: those that this process sees; on CPU LOCAL_WORLD_SIZE,
            else the world size). The device's index is rank mod gpu_count.
        mem_fraction: share of the free device memory that an update may use (default:
            PS_MEM_FRACTION, else 0.9).
        master_addr, master_port: where rank 0 serves the control store (default: MASTER_ADDR, and
            MASTER_PORT + 1, since the launcher's own store has MASTER_PORT).
        device: `cuda`, `npu` or `cpu`, or None to detect.

    Raises:
        ConfigError: a bad value; the message names the argument or the variable.
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        auto_pg: bool = True,
        gpu_count: int | None = None,
        mem_fraction: float | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        device: str | None = None,
    ) -> None:
        for name, value in {
            "rank": rank,
            "world_size": world_size,
            "gpu_count": gpu_count,
            "master_port": master_port,
        }.items():
            if value is not None and type(value) is not int:
                raise ConfigError(f"{name}={value!r}: give an int, not a {type(value).__name__}")
        if mem_fraction is not None and type(mem_fraction) not in (int, float):
            raise ConfigError(f"mem_fraction={mem_fraction!r}: give a number above 0 and at most 1")
        self.settings = load_settings()
        self.rank, self.world_size = place_of(rank, world_size, self.settings)
        self.mem_fraction = self.settings.mem_fraction if mem_fraction is None else mem_fraction
        if not 0 < self.mem_fraction <= 1:
            raise ConfigError(f"mem_fraction={mem_fraction}: must be above 0 and at most 1")
        if master_port is not None and not 0 < master_port < 65536:
            raise ConfigError(f"master_port={master_port}: must be from 1 to 65535")
        device = detect_device(device)
        count = gpu_count
        if count is None:
            count = device_count(device) or self.settings.local_world_size or self.world_size
        if count < 1:
            raise ConfigError(f"gpu_count={gpu_count}: must be at least 1")
        self.local_rank = self.rank % count
        self.auto_pg = auto_pg
        self._master_addr, self._master_port = master_addr, master_port
        self._device = make_device(device, self.settings, self.local_rank)
        if self.settings.custom_dist != "auto":
            check_custom_dist(self.settings.custom_dist, self._device)
        self._registry = CheckpointRegistry(
            self.settings.load_threads, self.settings.huge_pages, self._device.pinner, self._near_cpus()
        )
        self._failed: dict[str, ErrorRecord] = {}
        self._gathered = GatheredMetas(self.rank)
        self._gathering = Gathering()
        self._collecting = Collecting(release_group=self.settings.release_groups)
        self._p2p = P2PEnds(
            self.settings,
            self._device,
            gpu_count=count,
            local_rank=self.local_rank,
            host_ip=self.settings.host_ip or host_ip(master_addr or self.settings.master_addr),
        )
        self._me: Rank | None = None
        self._in_place = InPlace()
        self._owns_default_group = False
        _OPEN.add(self)

    def _near_cpus(self) -> frozenset[int] | None:
        """The CPUs that make host arenas; None: any."""
        place = numa_place_of(self._device.type, self.local_rank) if self.settings.numa else None
        if place is None:
            return None
        logger.info("rank %d: %s %d is on %s", self.rank, self._device.type, self.local_rank, place)
        return place.cpus or None

    # Checkpoints

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[str | PathLike[str] | FileSelection] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = False,
        digests: bool | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Loads this rank's share into host memory.

        Args:
            files: `.safetensors` files, whole or in part (`FileSelection`), and TP-sharded `.npy` files, all
                shards of a layer, which become whole tensors (`ckpt_engine.checkpoint.npy_file`).
            named_tensors: tensors on any device; their bytes are copied.
            use_shared_memory_pool: into one arena that is kept and refilled: one checkpoint at a time, which
                need not have the shape of the one before.
            use_inplace_pin_memory: `.safetensors` files below /dev/shm become host memory where they are, and
                are removed once all is registered (CUDA; elsewhere they are copied). They must not be touched
                any more. Also on by CKPT_ENGINE_INPLACE_PIN.
            digests: make one of each tensor's bytes, for `update(verify=...)`: they are read once more.
                None: if CKPT_ENGINE_VERIFY is not off.
            on_progress: called with (bytes loaded, bytes to load), by one thread at a time; its exception
                ends the registration. What stays in place is not loaded.

        Raises:
            CheckpointExistsError: the name is taken.
            CheckpointError: another checkpoint is in the pool; a file cannot be read.
            CheckpointFormatError: a file is not what it claims to be.
            HostMemoryError: it does not fit, or cannot be pinned. Nothing is registered, and no file
                removed, after any failure.
        """
        with self._registering(checkpoint_name):
            self._registry.register(
                checkpoint_name,
                files=files,
                named_tensors=named_tensors,
                use_shared_memory_pool=use_shared_memory_pool,
                use_inplace_pin_memory=use_inplace_pin_memory or self.settings.inplace_pin,
                digests=self._makes_digests(digests),
                on_progress=on_progress,
            )

    def _makes_digests(self, asked: bool | None) -> bool:
        return self.settings.verify != "off" if asked is None else asked

    @contextmanager
    def _registering(self, checkpoint_name: str) -> Iterator[None]:
        """Remembers a failure: the other ranks wait for this one in gather_metas, where they get to know."""
        try:
            with staged(logger, "register", rank=self.rank, checkpoint=checkpoint_name) as known:
                yield
                held = self._registry.find(checkpoint_name)
                known["nbytes"] = held.nbytes if held is not None else 0
        except CheckpointExistsError:
            raise
        except Exception as error:
            self._failed[checkpoint_name] = ErrorRecord.from_exception(
                error, rank=self.rank, host=self.settings.host_id, stage="register"
            )
            raise
        self._failed.pop(checkpoint_name, None)

    def register_state_dict(
        self,
        checkpoint_name: str,
        state_dict: Mapping[str, torch.Tensor],
        *,
        rename: Rename | None = None,
        dtype: Cast | None = None,
        use_shared_memory_pool: bool = False,
        digests: bool | None = None,
        bucket_nbytes: int = BUCKET_NBYTES,
        timeout: Timeout = TEN_MINUTES,
        on_progress: Progress | None = None,
    ) -> None:
        """Registers a trainer's state dict, sharded or not. Every rank must call it, as the same rank.

        Each tensor becomes whole in the host memory of one rank; ranks get about equal shares. Shards go
        straight there: beside its share no rank ever has more of the model than two buckets. All ranks
        succeed, or none; follow with `gather_metas`.

        Args:
            state_dict: plain tensors and DTensors (FSDP2, tensor parallel), such as `model.state_dict()`.
                What several ranks have under one name is the same tensor, and is registered once. Sums that
                are still to be made (Partial) are made.
            rename: the trainer's name -> the engine's; None leaves an entry out.
            dtype: floating-point tensors of 2 bytes and more are cast to it, before they travel; or a
                function of the engine's name (None: as it is).
            use_shared_memory_pool, digests, on_progress: as of `register_checkpoint`.
            bucket_nbytes: what travels to a rank at a time, unless one tensor is larger. Alike on all ranks.

        Raises:
            ConfigError, CheckpointError, HostMemoryError: on the rank where it is so, or where all see it.
            UpdateError: and on the others; also where a rank did not come. Nothing is registered.
        """
        if type(bucket_nbytes) is not int or bucket_nbytes < 1:
            raise ConfigError(f"bucket_nbytes={bucket_nbytes!r}: give a number of bytes of at least 1")
        deadline = deadline_of(timeout)
        control = self._rank(deadline).control
        with (
            self._registering(checkpoint_name),
            self._collecting.collection(control, checkpoint_name, bucket_nbytes, deadline) as incoming,
        ):
            self._registry.register(
                checkpoint_name,
                incoming=incoming(lambda: read_state_dict(state_dict, rename, dtype)),
                use_shared_memory_pool=use_shared_memory_pool,
                digests=self._makes_digests(digests),
                on_progress=on_progress,
            )

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:
        """Frees the memory of a checkpoint; that of one in the shared memory pool is kept for the next one.

        An unknown name is only warned about. It waits until nobody reads the memory by P2P any more.

        Args:
            force: frees the pool as well, unless another checkpoint is in it; and the memory, though somebody
                still reads it after CKPT_ENGINE_LEASE_TIMEOUT: their updates fail.

        Raises:
            CheckpointError: somebody still reads it. The memory stays; unregister it again.
        """
        self._p2p.withdraw(checkpoint_name, force=force)
        self._gathered.forget(checkpoint_name)
        failed = self._failed.pop(checkpoint_name, None)
        if not self._registry.unregister(checkpoint_name, force=force) and failed is None:
            logger.warning("checkpoint %r is not registered on rank %d", checkpoint_name, self.rank)

    @property
    def checkpoint_names(self) -> list[str]:
        """What is registered on this rank, sorted."""
        return self._registry.names()

    @property
    def checkpoints(self) -> list[Share]:
        """The same, with what each holds. Can be asked for from any thread."""
        return [checkpoint.share for checkpoint in self._registry.held()]

    def gather_metas(
        self, checkpoint_name: str, timeout: Timeout = TEN_MINUTES, *, ranks: Sequence[int] | None = None
    ) -> None:
        """The ranks exchange what each holds of a checkpoint. Every one of them must call it.

        Args:
            ranks: those that hold the whole checkpoint between them; None: all. Name those that are left once
                a rank is gone for good.

        Raises:
            UnknownCheckpointError: no rank holds anything under this name.
            ConfigError: two ranks have the same device UUID, or `ranks` is out of range.
            CheckpointError: ranks are gone that held tensors which nobody else holds, or may have.
            UpdateError: a rank did not come, or could not register its share; the same on every rank.
        """
        deadline = deadline_of(timeout)
        purpose = f"gather_metas({checkpoint_name!r})"
        members = self._in_range(ranks, purpose)
        if self.rank not in members:
            raise ConfigError(f"ranks={members}: rank {self.rank} is not among them: it must not gather")
        me = self._rank(deadline)
        held = self._registry.find(checkpoint_name)
        meetings = Meetings(
            control=me.control,
            purpose=purpose,
            members=members,
            deadline=deadline,
            without_lost=ranks is None,
            failed=self._failed.get(checkpoint_name),
        )
        with staged(logger, "gather", rank=self.rank, checkpoint=checkpoint_name):
            gathered = self._gathering.gather(lambda: self._metas_of(checkpoint_name, held), meetings.meet)
        self._gathered.put(checkpoint_name, gathered, meetings.lost, self._registry.names())

    def get_metas(self) -> Metas:
        """What was gathered or loaded last: rank -> what it holds."""
        return dict(self._gathered.shown)

    def get_fleets(self) -> list[Metas]:
        """What others need to join: of all who hold what was gathered or loaded last, as far as this rank
        knows. A fleet that keeps what it has joined is the first of them itself."""
        return list(self._gathered.fleets)

    def load_metas(self, metas: Metas | Sequence[Metas]) -> str:
        """Replaces the senders' side of a checkpoint by another fleet's metas, and derives its topology.

        Updates of that checkpoint, which need `ranks`, then read it by P2P from the other fleet. Of several
        fleets that hold the same weights one is read, and the others are there in case its ranks die.

        Returns:
            The checkpoint's name, by these metas.

        Raises:
            CheckpointFormatError: the metas contradict themselves.
            CheckpointError: they are of different weights, or of ranks that cannot be read by P2P.
        """
        fleets = [metas] if isinstance(metas, Mapping) else list(metas)
        # Through JSON: what another process sent is checked like what this one made.
        return self._gathered.load([metas_from_json(metas_to_json(fleet)) for fleet in fleets])

    @property
    def remote_topology(self) -> dict[str, set[int]]:
        """`{rdma_device}@{host}` -> the senders' ranks behind it."""
        return {device: set(ranks) for device, ranks in self._gathered.topology.items()}

    # Updates

    def update(
        self,
        checkpoint_name: str,
        req_func: Callable[[SocketPaths], object],
        *,
        timeout: Timeout = TEN_MINUTES,
        ranks: Sequence[int] | None = None,
        version: str | None = None,
        on_failure: Literal["raise", "restore"] = "raise",
        verify: Verify | None = None,
        keep_buffers: bool = False,
        keep: bool = False,
        on_progress: Progress | None = None,
    ) -> UpdateReport:
        """Puts the checkpoint into the workers of all `ranks`, or into none. Each of them must call it.

        Args:
            req_func: called once, in a thread, with `[(device_uuid, zmq_handle), ...]` of all ranks; it
                asks the engine to start receiving.
            timeout: until the update is decided. A failed one may take some seconds more: workers get 10 s to
                leave their loops, or their memory could be freed under them.
            ranks: those to update; None or empty: all. What others hold is read by P2P, while they go on with
                what they do. Only those of them must call whose share cannot be read so (they published no
                address, or none of `ranks` did): they take part without a worker. Whoever else calls
                is not needed, and returns at once, with a report of no version.
            version: what a commit puts in place is called, by workers and reports; alike on all ranks. None:
                a number that grows from update to update.
            on_failure: "restore": after a failure the version that was committed last is put back into all
                workers that may have loaded something, in up to `timeout` again; `req_func` is called again
                for that. The failure is raised all the same, and says what was `restored`. It must still be
                registered and gathered, which is checked before a byte moves.
            verify: "transport": workers compare what arrives with the digests that were made when it was
                registered; "full": also what their engines then hold, as far as the adapter can tell. A
                tensor of other bytes ends the update. None: CKPT_ENGINE_VERIFY, by default "off".
            keep_buffers: keep the ring on the device for the next update: faster, but its memory is not the
                engine's in between, nor while the post hooks run.
            keep: of another fleet, whose metas were loaded: what this rank reads stays in its host memory,
                as its share of the checkpoint, and others who join that fleet read it here, from the first
                bucket on. Needs the memory for it. The ranks then gather what they keep: it is what they
                update from, and what those are told who join by them. Ends with `unregister_checkpoint`.
            on_progress: called with (bytes loaded by this rank's worker, bytes in all).

        Raises:
            UpdateError: the update did not commit; every rank raises the same record.
            RestoreError: and what was there before could not be put back.
            PublishError: it did, but `req_func` failed.
            UnknownCheckpointError: not gathered since it was registered, nor loaded.
            CheckpointError: there is nothing to restore.
        """
        verify = self.settings.verify if verify is None else verify
        check_arguments(version, on_failure, verify)
        restores = on_failure == "restore"
        purpose = purpose_of(checkpoint_name, version, verify=verify, restores=restores)
        wanted = self._in_range(ranks, purpose)
        members = self._gathered.members(checkpoint_name, wanted, all_ranks=not ranks)
        if self.rank not in members:
            logger.info("rank %d is not needed in the update of %r on %s", self.rank, checkpoint_name, wanted)
            return UpdateReport.not_needed(checkpoint_name)
        running = Running(
            rank=self.rank,
            registry=self._registry,
            gathered=self._gathered,
            p2p=self._p2p,
            in_place=self._in_place,
            join=self._rank,
            metas_of=self._metas_of,
            gather=self.gather_metas,
        )
        return running.run(
            Wanted(
                checkpoint_name=checkpoint_name,
                req_func=req_func,
                timeout=timeout,
                members=members,
                receivers=wanted,
                receives=self.rank in wanted,
                version=version,
                restores=restores,
                verify=verify,
                keep_buffers=keep_buffers,
                keep=keep,
                progress=on_progress,
            )
        )

    @property
    def weights(self) -> Weights:
        """What this rank's worker holds, by its last update from here. Can be asked for from any thread."""
        return self._in_place.weights.now

    def _in_range(self, ranks: Sequence[int] | None, purpose: str) -> list[int]:
        """The ranks, sorted; None or empty: all.

        Raises:
            ConfigError: there are no such ranks; the others, who may be waiting for this one, get to know.
        """
        wanted = sorted(set(ranks or range(self.world_size)))
        if wanted[0] >= 0 and wanted[-1] < self.world_size:
            return wanted
        mistake = ConfigError(f"ranks={list(ranks or [])}: must be from 0 to {self.world_size - 1}")
        if self._me is not None:
            record = ErrorRecord.from_exception(mistake, rank=self.rank, stage="begin")
            self._me.control.tell_mistake(purpose, record)
        raise mistake

    # Groups

    def init_process_group(
        self,
        *,
        master_addr: str | None = None,
        master_port: int | None = None,
        timeout: Timeout = TEN_MINUTES,
    ) -> None:
        """Makes the control store, and torch's default process group on it where there is none.

        The updates themselves never use the default group: this is for callers who do.
        """
        if self._me is not None and (master_addr or master_port):
            raise ConfigError("master_addr and master_port were given, but the control store is up already")
        self._master_addr = master_addr or self._master_addr
        self._master_port = master_port or self._master_port
        deadline = deadline_of(timeout)
        me = self._rank(deadline, explicit=True)
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                store=PrefixStore("default", me.control.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=max(1.0, deadline.remaining)),
            )
            self._owns_default_group = True

    def _rank(self, deadline: Deadline, *, explicit: bool = False) -> Rank:
        """What this rank keeps between updates, made when first needed."""
        if self._me is not None:
            return self._me
        if not (self.auto_pg or explicit or dist.is_initialized()):
            raise ConfigError("auto_pg=False: call init_process_group() first, or torch.distributed's own")
        self._me = Rank.join(
            self.rank,
            self.world_size,
            self.settings,
            self.mem_fraction,
            self._device,
            self._p2p.reading,
            lambda directory: self._meeting_point(directory, deadline),
            deadline,
        )
        return self._me

    def _meeting_point(self, directory: SocketDirectory, deadline: Deadline) -> MeetingPoint:
        """The caller's store where the caller manages the groups and has one; else our own."""
        if not self.auto_pg and dist.is_initialized() and not self._owns_default_group:
            return store_of_caller(self.rank, self.world_size, self._master_addr)
        return own_store(
            self.rank,
            self.world_size,
            self._master_addr,
            self._master_port,
            self.settings,
            deadline,
            directory,
        )

    # Ending

    def close(self) -> None:
        """Frees host memory, sockets and groups. Idempotent; also called at the interpreter's exit."""
        _OPEN.discard(self)
        me, self._me = self._me, None
        with ExitStack() as ending:  # The last first, and each whatever the others raise.
            if me is not None:
                ending.callback(me.close)
            ending.callback(self._collecting.drop_group)
            if self._owns_default_group and dist.is_initialized():
                self._owns_default_group = False
                ending.callback(dist.destroy_process_group)
            ending.callback(self._registry.close)
            ending.callback(self._p2p.close)

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Metas

    def _metas_of(
        self, checkpoint_name: str, held: HostCheckpoint | None, *, filled: bool = True
    ) -> RankMetas:
        return RankMetas(
            rank=self.rank,
            host=self.settings.host_id,
            host_ip=self._p2p.host_ip,
            device_uuid=self._device.uuid(),
            epoch=held.epoch if held else "",
            checkpoint=checkpoint_name,
            buffers=held.buffers if held else (),
            **self._p2p.offer(held, filled=filled),
        )


_OPEN: weakref.WeakSet[ParameterServer] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Rank 0 serves the store: it must not go before the others have read the last decision."""
    for server in list(_OPEN):
        server.close()
