"""A cluster in figures: what `ckpt-engine plan --cluster FILE` needs to tell how long an update would take.

name = "8 GPUs, one host"
device = "cuda"
ranks_per_host = 8

[rates]                 # GB/s, 10^9 bytes per second
h2d = 55.0              # from pinned host memory to one device
broadcast = 150.0       # what every rank of a host receives at once
reload = 2000.0         # what one worker loads

[seconds]
begin = 0.004           # a stage's own time
bucket = 0.0002         # a bucket's, in each worker

[checkpoint]            # where no path is given
gb = 470.0
tensors = 36945

[p2p]                   # for --joiners
nic = 24.0              # GB/s through one RDMA device, each way
nics = 8                # RDMA devices of a host

[owners]                # whom they join, where that is another fleet than one like this
hosts = 2
ranks_per_host = 8
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ckpt_engine.errors import ConfigError
from ckpt_engine.metadata import HostBufferMeta, Metas, RankMetas, TensorMeta, align_up

BUFFER_NBYTES = 4 * 2**30


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rates(_Model):
    """GB/s. On CPU `h2d` and `reload` are what one process copies, and `memory` all of a host's together."""

    h2d: float = Field(gt=0)
    h2d_host: float | None = Field(None, gt=0, description="all devices of a host at once")
    copy_: float = Field(2000.0, gt=0, alias="copy", description="staging buffer to slot")
    broadcast: float = Field(150.0, gt=0, description="received by every rank, inside a host")
    between_hosts: float | None = Field(None, gt=0, description="received by every host")
    reload: float = Field(gt=0)
    memory: float | None = Field(None, gt=0, description="CPU: all copies of a host at once")


class Seconds(_Model):
    """What is not bytes. A stage's own time by its name; `bucket` and `tensor` in each worker; `step` for
    each doubling of the number of hosts, in each broadcast; `read` for each bucket that is read by P2P;
    `announce` from a joiner's begin to the next one's, of those who come at once."""

    begin: float = Field(0.0, ge=0)
    handshake: float = Field(0.0, ge=0)
    release: float = Field(0.0, ge=0)
    post_hook: float = Field(0.0, ge=0)
    decide: float = Field(0.0, ge=0)
    publish: float = Field(0.0, ge=0)
    bucket: float = Field(0.0, ge=0)
    tensor: float = Field(0.0, ge=0)
    step: float = Field(0.0, ge=0)
    read: float = Field(0.0, ge=0)
    announce: float = Field(0.0, ge=0)


class Synthetic(_Model):
    """A checkpoint of so many equal tensors, every rank with as many as the others, one more or less."""

    gb: float = Field(gt=0)
    tensors: int = Field(ge=1)


class P2P(_Model):
    """How ranks read from other hosts: `nics` RDMA devices in each, dealt to its ranks as by `share_out`,
    each of `nic` GB/s in each direction. No RDMA device: `nic` is a host's network."""

    nic: float = Field(gt=0)
    nics: int = Field(0, ge=0)
    at_once: int = Field(4, ge=1, description="reads of one receiver")
    readers: int = Field(4, ge=1, description="updates that read an owner: CKPT_ENGINE_P2P_READERS")


class Owners(_Model):
    """A fleet that is joined. `nic`, `nics`: where they are not the joiners'."""

    hosts: int = Field(1, ge=1)
    ranks_per_host: int = Field(ge=1)
    nic: float | None = Field(None, gt=0)
    nics: int | None = Field(None, ge=0)

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host


class Cluster(_Model):
    """`hosts` alike, each with `ranks_per_host` ranks, one device each.

    `figures`: where its figures come from; `measured`: seconds of the whole update, or of one join where
    there is `p2p`, if somebody measured them: they are shown beside the model's, and do not go into it.
    """

    name: str
    figures: str = ""
    measured: float | None = Field(None, gt=0)
    device: Literal["cuda", "npu", "cpu"] = "cuda"
    hosts: int = Field(1, ge=1)
    ranks_per_host: int = Field(ge=1)
    rates: Rates
    seconds: Seconds = Seconds()
    checkpoint: Synthetic | None = None
    p2p: P2P | None = None
    owners: Owners | None = None

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def joined(self) -> Owners:
        """The fleet that it joins."""
        return self.owners or Owners(hosts=self.hosts, ranks_per_host=self.ranks_per_host)

    def host_of(self, rank: int) -> int:
        return rank // self.ranks_per_host


def load_cluster(path: Path) -> Cluster:
    """From a TOML or JSON file, by its name's end.

    Raises:
        ConfigError: it is neither, or not a cluster's description; the message names each field at fault.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            return Cluster.model_validate(_toml(text))
        return Cluster.model_validate(json.loads(text))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{path}: {problems}") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is neither TOML nor JSON: {error}") from None


def _toml(text: str) -> object:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError:
        raise ConfigError("TOML needs Python 3.11: write the same as JSON") from None
    return tomllib.loads(text)


def synthetic_metas(checkpoint: Synthetic, world_size: int) -> Metas:
    """What every rank would hold of it."""
    nbytes = max(1, int(checkpoint.gb * 1e9 / checkpoint.tensors))
    metas: Metas = {}
    for rank in range(world_size):
        buffers: list[HostBufferMeta] = []
        tensors: list[TensorMeta] = []
        for number in range(rank, checkpoint.tensors, world_size):
            offset = len(tensors) * align_up(nbytes)
            if tensors and offset + nbytes > BUFFER_NBYTES:
                buffers.append(HostBufferMeta(address=0, nbytes=offset, tensors=tuple(tensors)))
                tensors, offset = [], 0
            tensors.append(
                TensorMeta(name=f"t{number}", dtype="uint8", shape=(nbytes,), offset=offset, nbytes=nbytes)
            )
        if tensors:
            end = tensors[-1].offset + nbytes
            buffers.append(HostBufferMeta(address=0, nbytes=end, tensors=tuple(tensors)))
        metas[rank] = RankMetas(
            rank=rank, host="", host_ip="", device_uuid=f"rank-{rank}", epoch="", buffers=tuple(buffers)
        )
    return metas
