"""`ckpt-engine update`: one rank of an update, from files to the engine's workers.

Started once per rank by `torchrun`; alone it is a world of one. Rank 0 tells what happens on stdout,
the others only their errors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ckpt_engine.cli import Verbose
from ckpt_engine.cli.push import AnyEngine, InferenceGroup, Split, Target, UpdateMethod, Weights, push

DEFAULT_ENDPOINT = "http://localhost:19730"


class Verification(str, Enum):
    OFF = "off"
    TRANSPORT = "transport"
    FULL = "full"


class OnFailure(str, Enum):
    RAISE = "raise"
    RESTORE = "restore"


class Engine(str, Enum):
    """Which engine listens at the endpoint."""

    ANY = "any"
    VLLM = "vllm"


def positive(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise typer.BadParameter(f"{seconds} is not a finite number of seconds above 0")
    return seconds


def only_raise(on_failure: OnFailure) -> OnFailure:
    """This process has put nothing in place before its one update, so that it has nothing to put back."""
    if on_failure is OnFailure.RESTORE:
        raise typer.BadParameter(
            "restore needs the version that the engines have now, in the host memory of the process that put "
            "it there, and this command makes one update and ends. Use `ckpt-engine serve`, whose update "
            "requests take on_failure, or ParameterServer.update(on_failure='restore'); or run this command "
            "once more with the checkpoint before: a full update makes an incomplete engine whole"
        )
    return on_failure


def not_negative(seconds: float) -> float:
    return seconds if seconds == 0 else positive(seconds)


def update(
    checkpoint_path: Annotated[
        Path | None,
        typer.Option(
            help="A .safetensors file, or a directory of them or of .npy shards.", show_default=False
        ),
    ] = None,
    checkpoint_name: Annotated[str, typer.Option(help="Its name.")] = "my-checkpoint-iter-0",
    update_method: Annotated[
        UpdateMethod,
        typer.Option(
            help="broadcast: every rank gives its share. p2p: only the first inference group is updated, and "
            "reads what other ranks hold from their memory. all: one after the other."
        ),
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
    ignored: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="With --engine vllm: tensors of these names (fnmatch: vision.*) are not for the engine. "
            "Repeated: any of them.",
            show_default=False,
        ),
    ] = None,
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
        list[Path] | None,
        typer.Option(
            help="Instead of a checkpoint: join the ranks whose metas were saved to this file, and read the "
            "weights from their memory. Repeated: fleets that hold the same weights.",
            show_default=False,
        ),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option(
            help="The same of a live fleet: URL of one of its parameter servers (`ckpt-engine serve`), or "
            "unix:/path/of/its/socket.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="With --join or --load-metas-file: keep what is read in host memory, for --sleep-time "
            "seconds, so that others who join read it here.",
        ),
    ] = False,
    weight_version: Annotated[
        str | None,
        typer.Option(
            help="What the weights are called from then on, by workers and reports.",
            show_default="a number that grows",
        ),
    ] = None,
    verify: Annotated[
        Verification | None,
        typer.Option(
            help="Make digests while registering, and compare what arrives with them; full: what the engine "
            "then holds, too, where its adapter can tell.",
            show_default="CKPT_ENGINE_VERIFY, else off",
        ),
    ] = None,
    on_failure: Annotated[
        OnFailure,
        typer.Option(
            callback=only_raise,
            help="raise: engines that were touched stay incomplete until a full update succeeds. restore "
            "is refused here, for who makes one update has nothing to put back: see `ckpt-engine serve`.",
        ),
    ] = OnFailure.RAISE,
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
    if custom_dist != "auto":
        os.environ["CKPT_ENGINE_CUSTOM_DIST"] = custom_dist
    if verify is not None:
        os.environ["CKPT_ENGINE_VERIFY"] = verify.value
    make_engine = _engine_maker(engine, pause, api_key, partial=partial, ignored=ignored or (), native=native)
    weights = Weights.chosen(
        path=checkpoint_path,
        name=checkpoint_name,
        split=split,
        method=update_method,
        metas_files=load_metas_file or (),
        join=join or (),
        keep=keep,
    )
    push(
        make_engine,
        weights,
        endpoints=endpoint or [DEFAULT_ENDPOINT],
        inference_parallel_size=inference_parallel_size,
        uds=uds,
        sleep_time=sleep_time,
        save_metas_file=save_metas_file,
        report_file=report_file,
        timeout=timeout,
        health_timeout=health_timeout,
        version=weight_version,
    )


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
    engine: Engine, pause: str, api_key: str | None, *, partial: bool, ignored: Sequence[str], native: bool
) -> Callable[[InferenceGroup], Target]:
    """What makes a group's engine of the options. Raises typer.BadParameter for those that do not fit."""
    if engine is Engine.ANY:
        if pause != "none" or partial or ignored or native:
            raise typer.BadParameter(
                "--pause, --partial, --ignored and --native are for --engine vllm", param_hint="--engine"
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
        ignored=tuple(ignored),
        pause=PauseMode(pause),
        native=native,
    )
