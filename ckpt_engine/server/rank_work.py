"""What the routes do with the `ParameterServer`, in the models of the API."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_engine.checkpoint.progress import Progress
from ckpt_engine.errors import CkptEngineError, ConfigError, UnknownCheckpointError
from ckpt_engine.metadata import fleets_from_json
from ckpt_engine.server.access import Access
from ckpt_engine.server.api_models import (
    EngineTarget,
    FilesRequest,
    Gathered,
    GatherRequest,
    MetasLoaded,
    Registered,
    Unregistered,
    Updated,
    UpdateRequest,
)
from ckpt_engine.server.engine_client import request_inference_to_update, request_timeout
from ckpt_engine.server.failures import Cancelled

if TYPE_CHECKING:
    from ckpt_engine.parameter_server import ParameterServer
    from ckpt_engine.update.request import SocketPaths
    from ckpt_engine.update.session import UpdateReport


class InvalidMetas(CkptEngineError):
    """The body of POST /v1/metas is not a metas document."""


class RankWork:
    """This rank's part of each operation. The methods block. `progress` is told of the bytes done."""

    def __init__(self, ps: ParameterServer, access: Access, progress: Progress) -> None:
        self.ps = ps
        self.access = access
        self._progress = progress
        self.last_update: Updated | None = None

    def register(self, name: str, request: FilesRequest, files: Sequence[str]) -> Registered:
        began = time.monotonic()
        files = self.access.files(files)
        self.ps.register_checkpoint(
            name,
            files=files,
            use_shared_memory_pool=request.use_shared_memory_pool,
            use_inplace_pin_memory=request.use_inplace_pin_memory,
            digests=request.digests,
            on_progress=self._progress,
        )
        return Registered(checkpoint=name, files=len(files), seconds=time.monotonic() - began)

    def takes_files_in_place(self, request: FilesRequest) -> bool:
        return request.use_inplace_pin_memory or self.ps.settings.inplace_pin

    def unregister(self, name: str, force: bool) -> Unregistered:
        known = name in self.ps.checkpoint_names
        # Also when it is not known: what is remembered of a registration that failed goes too, and with
        # `force` the pool that an earlier checkpoint left.
        self.ps.unregister_checkpoint(name, force=force)
        if not known and not force:
            raise UnknownCheckpointError(f"nothing is registered as {name!r} on rank {self.ps.rank}")
        return Unregistered(checkpoint=name)

    def gather(self, name: str, request: GatherRequest) -> Gathered:
        began = time.monotonic()
        self.ps.gather_metas(name, timeout=request.timeout)
        metas = self.ps.get_metas()
        return Gathered(
            checkpoint=name,
            ranks=len(metas),
            tensors=sum(held.tensor_count for held in metas.values()),
            nbytes=sum(held.nbytes for held in metas.values()),
            seconds=time.monotonic() - began,
        )

    def check(self, request: UpdateRequest) -> None:
        """Raises ConfigError for ranks that are none; as `Access.check_engines` for engines."""
        self.access.check_engines(request.targets)
        world_size = self.ps.world_size
        lists = {"ranks": request.ranks} | {
            f"inference_group_ranks of {engine.update_url}": engine.inference_group_ranks
            for engine in request.targets
        }
        for what, ranks in lists.items():
            if ranks and max(ranks) >= world_size:
                raise ConfigError(f"{what}: {max(ranks)} is not a rank: they go from 0 to {world_size - 1}")

    def update(self, name: str, request: UpdateRequest) -> Updated:
        before = self.ps.weights
        try:
            report = self._update(name, request)
            updated = Updated(**asdict(report))
            if report.version:  # else this rank was not needed
                self.last_update = updated
        except BaseException as error:
            # Whoever broke it off came too late if the weights are in place all the same.
            now = self.ps.weights
            if not isinstance(error, Exception) and now.state == "serving" and now != before:
                raise Cancelled(f"{error}, and the weights were in place already", committed=True) from error
            raise
        return updated

    def _update(self, name: str, request: UpdateRequest) -> UpdateReport:
        return self.ps.update(
            name,
            req_func_of(
                request.targets,
                rank=self.ps.rank,
                world_size=self.ps.world_size,
                ranks=request.ranks,
                timeout=request.timeout,
            ),
            timeout=request.timeout,
            ranks=request.ranks,
            keep=request.keep,
            version=request.version,
            on_failure=request.on_failure,
            verify=request.verify,
            on_progress=self._progress,
        )

    def load_metas(self, text: bytes) -> MetasLoaded:
        try:
            fleets = fleets_from_json(text)
        except CkptEngineError as error:
            raise InvalidMetas(str(error)) from None
        self.ps.load_metas(fleets)
        return MetasLoaded(
            fleets=len(fleets),
            ranks=sum(map(len, fleets)),
            tensors=sum(held.tensor_count for held in fleets[0].values()),
            senders={device: sorted(ranks) for device, ranks in self.ps.remote_topology.items()},
        )


def req_func_of(
    engines: Sequence[EngineTarget],
    *,
    rank: int,
    world_size: int,
    ranks: Sequence[int] | None,
    timeout: float,
) -> Callable[[SocketPaths], None]:
    """The `req_func` of an update: asks the engines in whose group this rank is the lowest.

    Args:
        ranks: those that are updated; None or empty: all.
        timeout: of the update, in seconds; an engine gets slightly less.

    Raises:
        ConfigError: an engine's group has a rank that is not updated.
    """
    members = sorted(set(ranks or range(world_size)))
    mine: list[tuple[EngineTarget, list[int]]] = []
    for engine in engines:
        group = sorted(set(engine.inference_group_ranks or members))
        if outside := set(group) - set(members):
            raise ConfigError(
                f"inference_group_ranks of {engine.update_url}: rank {min(outside)} is not among the ranks "
                f"that are updated, {members}"
            )
        if group[0] == rank:
            mine.append((engine, group))

    def ask(socket_paths: SocketPaths) -> None:
        numbers = members if len(socket_paths) == len(members) else range(world_size)
        by_rank = dict(zip(numbers, socket_paths, strict=True))
        for engine, group in mine:
            request_inference_to_update(
                engine.update_url,
                [by_rank[member] for member in group],
                timeout=request_timeout(timeout),
                uds=engine.uds,
            )

    return ask
