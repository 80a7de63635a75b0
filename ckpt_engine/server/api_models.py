"""What the HTTP API takes and gives, as pydantic models: the source of its OpenAPI document.

Seconds are floats, sizes are bytes. Unknown fields of a request are refused, so that a misspelt one is not
silently without effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ckpt_engine.settings import Verify

MAX_SECONDS = 7 * 24 * 3600.0

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
RankList = list[Annotated[int, Field(ge=0)]]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FilesRequest(_Request):
    """Which files to register. Paths are of the parameter server's host, and absolute."""

    files: list[str] | str = Field(
        description="`.safetensors` or TP-sharded `.npy` files, or directories of them."
    )
    use_shared_memory_pool: bool = Field(False, description="As of `register_checkpoint`.")
    use_inplace_pin_memory: bool = Field(
        False, description="As of `register_checkpoint`. It removes the files once they are in place."
    )
    digests: bool | None = Field(None, description="As of `register_checkpoint`: for `verify`.")
    timeout: Seconds = Field(
        3600.0, description="Seconds that rank 0 waits for another rank's answer (`all_ranks` only)."
    )

    @model_validator(mode="after")
    def _absolute(self) -> FilesRequest:
        for path in self.paths:
            if not path.startswith("/") or "\0" in path:
                raise ValueError(f"{path!r} is not an absolute path")
        return self

    @property
    def paths(self) -> list[str]:
        return [self.files] if isinstance(self.files, str) else self.files


class GatherRequest(_Request):
    timeout: Seconds = Field(600.0, description="Seconds that the ranks may take to meet.")


class EngineTarget(_Request):
    """One engine, and the ranks beside its workers."""

    update_url: str = Field(
        min_length=1, description="Where it is asked, such as `http://h:p/collective_rpc`."
    )
    inference_group_ranks: RankList | None = Field(
        None,
        description="The ranks whose devices run this engine; none given: all. The lowest of them asks.",
    )
    uds: str | None = Field(None, min_length=1, description="Reach it on this Unix socket.")


class UpdateRequest(_Request):
    """An update, and the engines that are asked to receive it. No engine: somebody else tells the workers.

    One engine: `update_url`, `inference_group_ranks`, `uds`. Several: `engines`.
    """

    ranks: RankList | None = Field(None, description="The ranks to update; none given: all.")
    update_url: str | None = Field(None, min_length=1, description="As in `engines`.")
    inference_group_ranks: RankList | None = Field(None, description="As in `engines`.")
    uds: str | None = Field(None, min_length=1, description="As in `engines`.")
    engines: list[EngineTarget] | None = Field(None, description="Several engines, instead of `update_url`.")
    keep: bool = Field(
        False, description="As of `ParameterServer.update`: keep what is read of another fleet, for others."
    )
    version: str | None = Field(
        None, description="As of `ParameterServer.update`: what a commit puts in place is called."
    )
    on_failure: Literal["raise", "restore"] = Field(
        "raise", description="As of `ParameterServer.update`: restore puts the version before back."
    )
    verify: Verify | None = Field(
        None, description="As of `ParameterServer.update`: what is compared with the digests."
    )
    timeout: Seconds = Field(600.0, description="Seconds that the whole update may take.")

    @model_validator(mode="after")
    def _one_way(self) -> UpdateRequest:
        if self.update_url is None and (self.inference_group_ranks or self.uds):
            raise ValueError("inference_group_ranks and uds say how update_url is asked: give update_url")
        if self.update_url is not None and self.engines:
            raise ValueError("give update_url or engines, not both")
        seen: set[int] = set()
        for engine in self.targets:
            group = set(engine.inference_group_ranks or ())
            if len(self.targets) > 1 and not group:
                raise ValueError(f"several engines: give inference_group_ranks of {engine.update_url}")
            if shared := group & seen:
                raise ValueError(f"rank {min(shared)} is in the groups of two engines")
            seen |= group
        return self

    @property
    def targets(self) -> list[EngineTarget]:
        """The engines, in whichever way they were given."""
        if self.update_url is None:
            return self.engines or []
        return [
            EngineTarget(
                update_url=self.update_url, inference_group_ranks=self.inference_group_ranks, uds=self.uds
            )
        ]


class Registered(BaseModel):
    checkpoint: str
    files: int = Field(description="Files that this rank read.")
    seconds: float


class Unregistered(BaseModel):
    checkpoint: str


class Gathered(BaseModel):
    """What all ranks together hold."""

    checkpoint: str
    ranks: int
    tensors: int
    nbytes: int
    seconds: float


class Updated(BaseModel):
    """The fields of `UpdateReport`, as this rank saw the update."""

    model_config = ConfigDict(extra="allow")

    checkpoint: str
    version: str
    tensors: int
    nbytes: int
    seconds: float


class MetasLoaded(BaseModel):
    fleets: int
    ranks: int = Field(description="Of all fleets.")
    tensors: int = Field(description="Of the checkpoint.")
    senders: dict[str, list[int]] = Field(description="`{rdma_device}@{host}` -> the ranks behind it.")


class Running(BaseModel):
    """The long operation that a rank is at."""

    number: int = Field(description="Grows from operation to operation of this rank.")
    operation: str
    checkpoint: str
    seconds: float = Field(description="Since it began.")
    bytes_done: int = Field(0, description="Loaded, or given back by this rank's worker.")
    bytes_total: int = Field(0, description="0: not known, or nothing that is counted in bytes.")
    eta_seconds: float | None = Field(None, description="Until all bytes are done, at the pace so far.")


class CheckpointHeld(BaseModel):
    """A checkpoint's share that is registered on this rank."""

    name: str
    nbytes: int = Field(description="Of this rank's tensors.")
    tensors: int
    digests: bool = Field(description="Whether updates from it can be verified.")


class WeightsHeld(BaseModel):
    """What this rank's worker holds, by its last update from here."""

    state: Literal["unknown", "serving", "updating", "incomplete"]
    version: str | None = Field(None, description="Of what is served.")
    checkpoint: str | None = None
    reason: str | None = Field(None, description="Why they are incomplete: neither the old nor the new.")


class Health(BaseModel):
    """Answered at any time, also during an update."""

    status: str = "ok"
    rank: int
    world_size: int
    checkpoints: list[str] = Field(description="Registered on this rank.")
    running: Running | None
    last_update: Updated | None = Field(description="The last one that this server committed.")
    weights: WeightsHeld


class ErrorBody(BaseModel):
    """Why a request failed."""

    error_type: str = Field(description="The exception's class, or the HTTP error's.")
    message: str
    record: dict[str, Any] | None = Field(
        None, description="Where an update failed first: rank, host, device, stage, bucket, tensors."
    )
    traceback: str = Field("", description="From where it happened, also when that was another process.")
    committed: bool | None = Field(
        False, description="True: the weights are in place nevertheless. Null: this rank does not know."
    )
    restored: str | None = Field(None, description="The version that this rank's worker has again.")


class Ended(BaseModel):
    """An operation that has ended, on this rank."""

    number: int
    operation: str
    checkpoint: str
    ended_at: float = Field(description="Seconds since 1970, by this host's clock.")
    seconds: float
    nbytes: int
    version: str | None = Field(None, description="What an update committed.")
    stages: dict[str, float] = Field({}, description="Seconds of each of an update's.")
    error: ErrorBody | None = Field(None, description="None: it succeeded.")


class History(BaseModel):
    """`ended`: the last 100, the oldest first."""

    running: Running | None
    ended: list[Ended]


class RankAnswer(BaseModel):
    """One rank's part of an `all_ranks` request."""

    status: int = Field(description="HTTP status.")
    answer: dict[str, Any]
    undone: bool = Field(False, description="It was done, and undone again since another rank failed.")


class AllRanksAnswer(BaseModel):
    ranks: dict[int, RankAnswer]


class AllRanksError(ErrorBody):
    """The lowest of the ranks with the highest status speaks for all; `ranks` has every answer."""

    ranks: dict[int, RankAnswer]
