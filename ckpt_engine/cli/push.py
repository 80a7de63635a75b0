"""A rank's part of the commands that put weights into engines, from files or from another fleet's memory.

Rank 0 tells what happens on stdout, the others only their errors.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from ckpt_engine.cli import format_nbytes
from ckpt_engine.cli.files import check_can_be_written, write
from ckpt_engine.cli.join import fleets_of
from ckpt_engine.errors import ConfigError
from ckpt_engine.termination import ends_in_order

if TYPE_CHECKING:
    from ckpt_engine.checkpoint import FileSelection
    from ckpt_engine.checkpoint.progress import Progress
    from ckpt_engine.metadata import Metas
    from ckpt_engine.parameter_server import ParameterServer
    from ckpt_engine.update.request import SocketPaths
    from ckpt_engine.update.session import UpdateReport

_PLAIN_PROGRESS_SECONDS = 5.0


class UpdateMethod(str, Enum):
    """How the weights travel."""

    BROADCAST = "broadcast"
    P2P = "p2p"
    ALL = "all"


class Split(str, Enum):
    """How a checkpoint is split over the ranks."""

    FILE = "file"
    TENSOR = "tensor"


@dataclass(frozen=True, slots=True)
class InferenceGroup:
    """Ranks [first, first + size), whose devices run one engine, and where that engine listens. `count`: how
    many groups there are."""

    first: int
    size: int
    endpoint: str
    uds: str | None
    count: int = 1

    def part(self, socket_paths: SocketPaths) -> SocketPaths:
        """This group's handles, out of those of all ranks."""
        return socket_paths[self.first : self.first + self.size]


def inference_group(
    rank: int, world_size: int, *, size: int | None, endpoints: Sequence[str], uds: str | None
) -> InferenceGroup:
    """The inference group of `rank`.

    Args:
        size: ranks of a group; None: all of them are one group.
        endpoints: one for all groups, or one for each.
        uds: path of the engine's Unix socket, in which `{group}` stands for the group's number.
    """
    size = size or world_size
    if world_size % size:
        raise typer.BadParameter(
            f"{size} does not divide the world size, {world_size}", param_hint="--inference-parallel-size"
        )
    groups, group = world_size // size, rank // size
    if len(endpoints) not in (1, groups):
        raise typer.BadParameter(
            f"{len(endpoints)} endpoints for {groups} inference groups ({world_size} ranks, {size} each): "
            "give one, or one per group",
            param_hint="--endpoint",
        )
    return InferenceGroup(
        first=group * size,
        size=size,
        endpoint=endpoints[group if len(endpoints) > 1 else 0].rstrip("/"),
        uds=uds.replace("{group}", str(group)) if uds else None,
        count=groups,
    )


class Target(Protocol):
    """The engine of an inference group, as the command's rank that asks it sees it."""

    def wait_until_ready(self, timeout: float) -> None:
        """Until the engine can be asked to update. Raises EngineRequestError."""
        ...

    def receive(self, socket_paths: SocketPaths, timeout: float) -> None:
        """Has the engine's workers receive an update within `timeout` seconds. Raises EngineRequestError."""
        ...

    def paused(self, timeout: float) -> AbstractContextManager[None]:
        """Around the update: the engine answers no requests, where it can and was told to."""
        ...

    def finish(self) -> None:
        """After the commit. Raises EngineRequestError: the weights are in place, but something is not."""
        ...


@dataclass(frozen=True, slots=True)
class AnyEngine:
    """One that has `/health` and `/collective_rpc`."""

    group: InferenceGroup

    def wait_until_ready(self, timeout: float) -> None:
        from ckpt_engine.server.engine_client import wait_until_healthy

        wait_until_healthy(self.group.endpoint, timeout, self.group.uds)

    def receive(self, socket_paths: SocketPaths, timeout: float) -> None:
        from ckpt_engine.server.engine_client import request_inference_to_update

        url = f"{self.group.endpoint}/collective_rpc"
        request_inference_to_update(url, socket_paths, timeout, self.group.uds)

    def paused(self, timeout: float) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None: ...


@dataclass
class Stages:
    """Times the stages; `shown`: tells each one's duration when it is done."""

    shown: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self.say(f"{name} {self.seconds[name]:.2f} s")

    def say(self, text: str) -> None:
        if self.shown:
            typer.echo(text)


@dataclass(kw_only=True, frozen=True)
class Weights:
    """Where the weights come from, and how they travel.

    `path`: a checkpoint's files, registered as `name`; or `fleets`: metas of other fleets, whose weights are
    read by P2P. `method`: of a checkpoint's files. `keep`: what is read, for others to read.
    """

    path: Path | None = None
    name: str = "my-checkpoint-iter-0"
    split: Split | None = None
    method: UpdateMethod = UpdateMethod.BROADCAST
    fleets: Sequence[Metas] = ()
    keep: bool = False

    @classmethod
    def chosen(
        cls,
        *,
        path: Path | None,
        name: str,
        split: Split | None,
        method: UpdateMethod,
        metas_files: Sequence[Path],
        join: Sequence[str],
        keep: bool = False,
    ) -> Weights:
        """By a command's options. Raises typer.BadParameter, and what `fleets_of` raises."""
        joins = bool(metas_files or join)
        if joins and path is not None:
            raise typer.BadParameter(
                "give a checkpoint, or fleets to join with --load-metas-file and --join, not both",
                param_hint="--checkpoint-path",
            )
        if not joins and path is None:
            raise typer.BadParameter("say which checkpoint", param_hint="--checkpoint-path")
        if keep and not joins:
            raise typer.BadParameter("there is no fleet to join", param_hint="--keep")
        fleets = fleets_of(metas_files, join)
        return cls(path=path, name=name, split=split, method=method, fleets=fleets, keep=keep)

    @property
    def p2p(self) -> str:
        """CKPT_ENGINE_P2P, unless somebody has set it: no port is opened for nothing."""
        if self.fleets:
            return "auto"
        return "off" if self.method is UpdateMethod.BROADCAST else "on"


def push(
    make_engine: Callable[[InferenceGroup], Target],
    weights: Weights,
    *,
    endpoints: Sequence[str],
    inference_parallel_size: int | None,
    uds: str | None,
    sleep_time: float = 0.0,
    save_metas_file: Path | None = None,
    report_file: Path | None = None,
    timeout: float,
    health_timeout: float,
    version: str | None = None,
) -> UpdateReport:
    """This rank's part of a command that puts weights into engines. Rank 0 tells what happens.

    Args:
        make_engine: called with the rank's inference group.

    Raises:
        CkptEngineError, OSError: what failed; typer's BadParameter: a bad option.
    """
    from ckpt_engine.metadata import metas_to_json
    from ckpt_engine.parameter_server import ParameterServer

    with _p2p_unless_set("auto" if save_metas_file is not None else weights.p2p):
        ps = ParameterServer()
    with ends_in_order(), ps:  # from here on, nothing is left behind by a rank that its launcher ends
        leads = ps.rank == 0
        group = inference_group(
            ps.rank, ps.world_size, size=inference_parallel_size, endpoints=endpoints, uds=uds
        )
        if leads:
            check_can_be_written(save_metas_file, "--save-metas-file")
            check_can_be_written(report_file, "--report-file")
        stages = Stages(shown=leads)
        run = _Run(ps, stages, group, make_engine(group), timeout, health_timeout, version)
        name = run.prepare(weights)
        if leads and save_metas_file is not None:
            write(save_metas_file, metas_to_json(ps.get_metas()))
        report = run.updates(name, weights)
        if leads and report_file is not None:
            document = _report(report, stages, ps.world_size, weights)
            write(report_file, json.dumps(document, indent=2).encode() + b"\n")
        if sleep_time:
            stages.say(f"staying for {sleep_time:g} s")
            time.sleep(sleep_time)
        return report


@contextmanager
def _p2p_unless_set(value: str) -> Iterator[None]:
    if "CKPT_ENGINE_P2P" in os.environ:
        yield
        return
    os.environ["CKPT_ENGINE_P2P"] = value
    try:
        yield
    finally:
        del os.environ["CKPT_ENGINE_P2P"]


@dataclass
class _Run:
    """One rank's, with its engine."""

    ps: ParameterServer
    stages: Stages
    group: InferenceGroup
    target: Target
    timeout: float
    health_timeout: float
    version: str | None

    @property
    def asks(self) -> bool:
        """Whether it is this rank that asks the engine of its group."""
        return self.ps.rank == self.group.first

    def prepare(self, weights: Weights) -> str:
        """Until an update can begin; the checkpoint's name."""
        ps, name = self.ps, weights.name
        if weights.fleets:
            with self.stages.stage("load metas"):
                name = ps.load_metas(weights.fleets)
        else:
            assert weights.path is not None
            with self.stages.stage("register"), _progress("register", shown=self.stages.shown) as on_progress:
                share = share_of(weights.path, weights.split, ps.rank, ps.world_size)
                ps.register_checkpoint(name, files=share, on_progress=on_progress)
        if self.asks:
            with self.stages.stage("health"):
                self.target.wait_until_ready(self.health_timeout)
        if not weights.fleets:
            with self.stages.stage("gather"):
                # Ranks that ask no engine are here first, and wait for those that wait for theirs.
                ps.gather_metas(name, timeout=self.timeout + self.health_timeout)
        return name

    def updates(self, name: str, weights: Weights) -> UpdateReport:
        everybody = list(range(self.ps.world_size))
        if weights.fleets:
            # Those that ask no engine are here first.
            wait = self.timeout + self.health_timeout
            return self._update("update", name, everybody, wait, keep=weights.keep)
        report = None
        if weights.method in (UpdateMethod.BROADCAST, UpdateMethod.ALL):
            report = self._update("update", name, None, self.timeout)
        if weights.method in (UpdateMethod.P2P, UpdateMethod.ALL):
            first = everybody[: self.group.size]
            report = self._update("p2p update", name, first, self.timeout)
            # What the other ranks hold is being read: they stay until the first group has ended.
            self.ps.gather_metas(name, timeout=self.timeout)
        assert report is not None
        return report

    def _update(
        self, stage: str, name: str, ranks: list[int] | None, timeout: float, *, keep: bool = False
    ) -> UpdateReport:
        from ckpt_engine.server.engine_client import request_timeout

        takes_part = ranks is None or self.ps.rank in ranks
        asks = self.asks and takes_part

        def ask_engine(socket_paths: SocketPaths) -> None:
            if asks:
                self.target.receive(self.group.part(socket_paths), request_timeout(timeout))

        with (
            self.stages.stage(stage),
            _progress("update", shown=self.stages.shown and takes_part) as on_progress,
            self.target.paused(timeout) if asks else nullcontext(),
        ):
            report = self.ps.update(
                name,
                ask_engine,
                timeout=timeout,
                ranks=ranks,
                version=self.version,
                keep=keep,
                on_progress=on_progress,
            )
        if takes_part:
            self.stages.say(
                f"{name} is in place as version {report.version}: {report.tensors} tensors, "
                f"{format_nbytes(report.nbytes)}, {format_nbytes(report.nbytes / report.seconds)}/s"
                + (
                    f", {format_nbytes(report.p2p_nbytes)} read by P2P ({report.transport})"
                    * bool(report.transport)
                )
            )
        if asks:
            self.target.finish()
        return report


def share_of(path: Path, split: Split | None, rank: int, world_size: int) -> list[FileSelection]:
    """What `rank` registers of the checkpoint at `path`.

    Raises:
        ConfigError: by tensor, and there is no index that says which tensor is where.
        CheckpointError, CheckpointFormatError: as `split_checkpoint`.
    """
    from ckpt_engine.checkpoint import FileSelection, files_of, split_checkpoint, split_files
    from ckpt_engine.checkpoint.index import INDEX_NAME

    if split is Split.FILE:
        return [FileSelection(file) for file in split_files(files_of([path]), world_size)[rank]]
    if split is Split.TENSOR and path.is_dir() and not (path / INDEX_NAME).exists():
        raise ConfigError(f"--split tensor: {path} has no {INDEX_NAME}; use --split file")
    if split is Split.TENSOR and path.is_file():
        raise ConfigError(f"--split tensor: {path} is one file; give the directory with its {INDEX_NAME}")
    return split_checkpoint(path, rank, world_size)


def _report(report: UpdateReport, stages: Stages, world_size: int, weights: Weights) -> dict[str, Any]:
    return {
        "checkpoint": report.checkpoint,
        "version": report.version,
        "update_method": "join" if weights.fleets else weights.method.value,
        "world_size": world_size,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "buckets": report.buckets,
        "ring_bytes": report.ring_nbytes,
        "content": report.content,
        "p2p_transport": report.transport,
        "p2p_bytes": report.p2p_nbytes,
        "kept_bytes": report.kept_nbytes,
        "lost_sources": list(report.lost_sources),
        "update_seconds": report.seconds,
        "stages": stages.seconds,
        "update_stages": report.stages,
    }


@contextmanager
def _progress(what: str, *, shown: bool) -> Iterator[Progress | None]:
    """What to call with the bytes that are there: a bar on a terminal, else a line every 5 s (stderr)."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress(what)
        return
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(what: str) -> Callable[[int, int], None]:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _PLAIN_PROGRESS_SECONDS:
            told = now
            typer.echo(f"{what}: {format_nbytes(done)} of {format_nbytes(total)}", err=True)

    return tell
