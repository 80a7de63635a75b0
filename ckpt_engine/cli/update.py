"""`ckpt-engine update`: one rank of an update, from files to the engine's workers.

Started once per rank by `torchrun`; alone it is a world of one. Rank 0 tells what happens on stdout,
the others only their errors.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer.core import TyperCommand

from ckpt_engine.cli import Verbose, format_nbytes
from ckpt_engine.errors import CheckpointFormatError, ConfigError

if TYPE_CHECKING:
    from ckpt_engine.checkpoint import FileSelection
    from ckpt_engine.update.request import SocketPaths
    from ckpt_engine.update.session import Progress, UpdateReport

DEFAULT_ENDPOINT = "http://localhost:19730"
_PLAIN_PROGRESS_SECONDS = 5.0


class UpdateMethod(str, Enum):
    """How the weights travel."""

    BROADCAST = "broadcast"
    P2P = "p2p"
    ALL = "all"


class Engine(str, Enum):
    """Which engine listens at the endpoint."""

    ANY = "any"
    VLLM = "vllm"


class Split(str, Enum):
    """How a checkpoint is split over the ranks."""

    FILE = "file"
    TENSOR = "tensor"


@dataclass(frozen=True, slots=True)
class InferenceGroup:
    """Ranks [first, first + size), whose devices run one engine, and where that engine listens."""

    first: int
    size: int
    endpoint: str
    uds: str | None

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


def positive(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise typer.BadParameter(f"{seconds} is not a finite number of seconds above 0")
    return seconds


def not_negative(seconds: float) -> float:
    return seconds if seconds == 0 else positive(seconds)


def update(
    checkpoint_path: Annotated[
        Path | None,
        typer.Option(
            help="A .safetensors file, or a directory of them with or without an index.", show_default=False
        ),
    ] = None,
    checkpoint_name: Annotated[str, typer.Option(help="Its name.")] = "my-checkpoint-iter-0",
    update_method: Annotated[
        UpdateMethod,
        typer.Option(help="How the weights travel. Only broadcast is in this version."),
    ] = UpdateMethod.BROADCAST,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Split the checkpoint over the ranks by whole files, or by tensors, which needs an index.",
            show_default="tensor where there is an index, else file",
        ),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of the engine. Once: for all inference groups; repeated: one per group, in order.",
            show_default=DEFAULT_ENDPOINT,
        ),
    ] = None,
    inference_parallel_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks per inference group, i.e. per engine.", show_default="world size"),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="any: one that only has /health and /collective_rpc. vllm: also pauses generation (--pause) "
            "and resets the prefix cache."
        ),
    ] = Engine.ANY,
    pause: Annotated[
        str,
        typer.Option(
            help="With --engine vllm, requests that are being answered: none (they go on with the new "
            "weights), keep (so, and new ones queue up), wait (they finish first) or abort."
        ),
    ] = "none",
    partial: Annotated[
        bool,
        typer.Option(
            "--partial", help="With --engine vllm: modules that nothing is sent for keep their weights."
        ),
    ] = False,
    native: Annotated[
        bool,
        typer.Option(
            "--native",
            help="With --engine vllm: go through vLLM's weight-transfer routes; see its README.",
        ),
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", help="With --engine vllm: the server's key.", show_default=False),
    ] = None,
    uds: Annotated[
        str | None,
        typer.Option(help="Reach the engine on this Unix socket; {group} stands for the group's number."),
    ] = None,
    sleep_time: Annotated[
        float,
        typer.Option(
            callback=not_negative,
            help="Seconds to stay after the update, so that others may use these parameter servers.",
        ),
    ] = 0.0,
    save_metas_file: Annotated[
        Path | None, typer.Option(help="Write what every rank holds to this file, as JSON (rank 0).")
    ] = None,
    load_metas_file: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a checkpoint: join the ranks whose metas were saved to this file. It is "
            "checked; joining, which goes by P2P, is not in this version."
        ),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option(help="Write a report to this file, as JSON (rank 0).")
    ] = None,
    timeout: Annotated[
        float, typer.Option(callback=positive, help="Seconds that the update may take.")
    ] = 600.0,
    health_timeout: Annotated[
        float, typer.Option(callback=positive, help="Seconds to wait for the engine's /health.")
    ] = 600.0,
    custom_dist: Annotated[
        str,
        typer.Option(
            "--custom-dist",
            help="vllm_nccl, vllm_gloo or vllm_hccl: broadcast through vLLM's stateless groups. Alone, or "
            "auto: through groups chosen automatically. None of them touches torch's default group.",
        ),
    ] = "auto",
    verbose: Verbose = False,
) -> None:
    """Put a checkpoint into running engines. Run it on every rank with torchrun, or alone."""
    checkpoint_path = check_way(checkpoint_path, load_metas_file, update_method)
    if custom_dist != "auto":
        os.environ["CKPT_ENGINE_CUSTOM_DIST"] = custom_dist
    push(
        _engine_maker(engine, pause, api_key, partial=partial, native=native),
        checkpoint_path=checkpoint_path,
        checkpoint_name=checkpoint_name,
        split=split,
        endpoints=endpoint or [DEFAULT_ENDPOINT],
        inference_parallel_size=inference_parallel_size,
        uds=uds,
        sleep_time=sleep_time,
        save_metas_file=save_metas_file,
        report_file=report_file,
        timeout=timeout,
        health_timeout=health_timeout,
    )


def check_way(
    checkpoint_path: Path | None, load_metas_file: Path | None, update_method: UpdateMethod
) -> Path:
    """The checkpoint to push. Raises ConfigError, or typer's BadParameter: not in this version."""
    if load_metas_file is not None:
        _check_metas(load_metas_file)
        raise ConfigError(
            f"{load_metas_file} is right, but joining other ranks by P2P (--load-metas-file) is not in this "
            "version: give --checkpoint-path"
        )
    if checkpoint_path is None:
        raise typer.BadParameter("say which checkpoint", param_hint="--checkpoint-path")
    if update_method is not UpdateMethod.BROADCAST:
        raise typer.BadParameter(
            f"{update_method.value} is not in this version: use broadcast", param_hint="--update-method"
        )
    return checkpoint_path


def push(
    make_engine: Callable[[InferenceGroup], Target],
    *,
    checkpoint_path: Path,
    checkpoint_name: str,
    split: Split | None,
    endpoints: Sequence[str],
    inference_parallel_size: int | None,
    uds: str | None,
    sleep_time: float,
    save_metas_file: Path | None,
    report_file: Path | None,
    timeout: float,
    health_timeout: float,
) -> UpdateReport:
    """This rank's part of a command that puts a checkpoint into engines. Rank 0 tells what happens.

    Args:
        make_engine: called with the rank's inference group.

    Raises:
        CkptEngineError, OSError: what failed; typer's BadParameter: a bad option.
    """
    from ckpt_engine.metadata import metas_to_json
    from ckpt_engine.parameter_server import ParameterServer
    from ckpt_engine.server.engine_client import request_timeout

    with ParameterServer() as ps:
        leads = ps.rank == 0
        group = inference_group(
            ps.rank, ps.world_size, size=inference_parallel_size, endpoints=endpoints, uds=uds
        )
        if leads:
            _check_can_be_written(save_metas_file, "--save-metas-file")
            _check_can_be_written(report_file, "--report-file")
        stages = Stages(shown=leads)
        asks = ps.rank == group.first
        target = make_engine(group)

        def ask_engine(socket_paths: SocketPaths) -> None:
            if asks:
                target.receive(group.part(socket_paths), request_timeout(timeout))

        with stages.stage("register"):
            share = share_of(checkpoint_path, split, ps.rank, ps.world_size)
            ps.register_checkpoint(checkpoint_name, files=share)
        if asks:
            with stages.stage("health"):
                target.wait_until_ready(health_timeout)
        with stages.stage("gather"):
            # Ranks that ask no engine are here first, and wait for those that wait for theirs.
            ps.gather_metas(checkpoint_name, timeout=timeout + health_timeout)
        if leads and save_metas_file is not None:
            _write(save_metas_file, metas_to_json(ps.get_metas()))
        with (
            stages.stage("update"),
            _progress(shown=leads) as on_progress,
            target.paused(timeout) if asks else nullcontext(),
        ):
            report = ps.update(checkpoint_name, ask_engine, timeout=timeout, on_progress=on_progress)
        stages.say(
            f"{checkpoint_name} is in place as version {report.version}: {report.tensors} tensors, "
            f"{format_nbytes(report.nbytes)}, {format_nbytes(report.nbytes / report.seconds)}/s"
        )
        if asks:
            target.finish()
        if leads and report_file is not None:
            document = _report(report, stages, ps.world_size, UpdateMethod.BROADCAST)
            _write(report_file, json.dumps(document, indent=2).encode() + b"\n")
        if sleep_time:
            stages.say(f"staying for {sleep_time:g} s")
            time.sleep(sleep_time)
        return report


class UpdateCommand(TyperCommand):
    """Its `--custom-dist` alone stands for `--custom-dist auto`, as the reference has it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's
        option = "--custom-dist"
        if option in args:
            value = args.index(option) + 1
            if value == len(args) or args[value].startswith("-"):
                args = [*args[:value], "auto", *args[value:]]
        return super().parse_args(ctx, args)


def _engine_maker(
    engine: Engine, pause: str, api_key: str | None, *, partial: bool, native: bool
) -> Callable[[InferenceGroup], Target]:
    """What makes a group's engine of the options. Raises typer.BadParameter for those that do not fit."""
    if engine is Engine.ANY:
        if pause != "none" or partial or native:
            raise typer.BadParameter(
                "--pause, --partial and --native are for --engine vllm", param_hint="--engine"
            )
        return AnyEngine
    from ckpt_engine_vllm.server_client import PauseMode, VllmServer

    if pause not in set(PauseMode):
        raise typer.BadParameter(f"{pause!r}: one of none, keep, wait and abort", param_hint="--pause")
    return lambda group: VllmServer(
        endpoint=group.endpoint,
        uds=group.uds,
        api_key=api_key,
        partial=partial,
        pause=PauseMode(pause),
        native=native,
    )


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


def _check_metas(path: Path) -> None:
    """Raises ConfigError, or CheckpointFormatError, where the file has no metas of another fleet."""
    from ckpt_engine.metadata import metas_from_json

    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--load-metas-file {path}: {error.strerror or error}") from error
    try:
        metas = metas_from_json(text)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"--load-metas-file {path}: {error}") from None
    if not any(held.tensor_count for held in metas.values()):
        raise ConfigError(f"--load-metas-file {path}: its ranks hold no tensor")


def _report(report: UpdateReport, stages: Stages, world_size: int, method: UpdateMethod) -> dict[str, Any]:
    return {
        "checkpoint": report.checkpoint,
        "version": report.version,
        "update_method": method.value,
        "world_size": world_size,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "buckets": report.buckets,
        "ring_bytes": report.ring_nbytes,
        "update_seconds": report.seconds,
        "stages": stages.seconds,
        "update_stages": report.stages,
    }


@contextmanager
def _progress(*, shown: bool) -> Iterator[Progress | None]:
    """What to call with the bytes that have arrived: a bar on a terminal, else a line every 5 s (stderr)."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress()
        return
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("update", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress() -> Callable[[int, int], None]:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _PLAIN_PROGRESS_SECONDS:
            told = now
            typer.echo(f"update: {format_nbytes(done)} of {format_nbytes(total)}", err=True)

    return tell


def _check_can_be_written(path: Path | None, option: str) -> None:
    """Before the work, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path}: give a file in a directory that exists", param_hint=option)


def _write(path: Path, text: bytes) -> None:
    """All of it or nothing: who reads the file never sees a part."""
    made: Path | None = None
    try:
        path = path.resolve()  # a link stays one
        if path.exists() and not path.is_file():
            path.write_bytes(text)  # a pipe, or /dev/stdout
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            made = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o666 & ~_umask())
        made.replace(path)
        made = None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
