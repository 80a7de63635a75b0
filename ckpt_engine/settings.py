"""Every environment variable this package reads, in one place.

Variables that PyTorch's launchers define (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
NCCL's (NCCL_IB_HCA) and those that the reference defines (PS_*) keep their names; ours start with
CKPT_ENGINE_.
"""

from __future__ import annotations

import os
import socket
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ckpt_engine.errors import ConfigError

MiB = 1024 * 1024
GiB = 1024 * MiB

Verify = Literal["off", "transport", "full"]
"""What an update compares with the digests of what was registered."""

DEFAULT_SLOT_MIB = {"cuda": 256, "npu": 256, "cpu": 16}
"""A device's copies are at their limit from a few hundred MiB in flight; a host's are fastest near its
caches, and a ring's fresh pages cost more than the copies through them (benchmarks/update.py)."""


class Settings(BaseSettings):
    """Read from the environment when made; arguments win over the environment."""

    # Case counts: else SLOT_MIB or DEVICE_UUID, which are not ours, would be read as the fields' names.
    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, populate_by_name=True, case_sensitive=True, allow_inf_nan=False
    )

    # The launcher's
    rank: int | None = Field(None, ge=0, validation_alias=AliasChoices("rank", "RANK"))
    world_size: int | None = Field(None, ge=1, validation_alias=AliasChoices("world_size", "WORLD_SIZE"))
    local_world_size: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("local_world_size", "LOCAL_WORLD_SIZE")
    )
    master_addr: str | None = Field(None, validation_alias=AliasChoices("master_addr", "MASTER_ADDR"))
    master_port: int | None = Field(
        None, ge=1, le=65534, validation_alias=AliasChoices("master_port", "MASTER_PORT")
    )

    # The reference's
    mem_fraction: float = Field(
        0.9, gt=0, le=1, validation_alias=AliasChoices("mem_fraction", "PS_MEM_FRACTION")
    )
    max_bucket_size_gb: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("max_bucket_size_gb", "PS_MAX_BUCKET_SIZE_GB")
    )

    # Whose RDMA devices P2P uses: the reference's, and NCCL's
    rdma_devices: str | None = Field(
        None, validation_alias=AliasChoices("rdma_devices", "PS_P2P_STORE_RDMA_DEVICES")
    )
    nccl_ib_hca: str | None = Field(None, validation_alias=AliasChoices("nccl_ib_hca", "NCCL_IB_HCA"))
    host_ip: str | None = Field(None, validation_alias=AliasChoices("host_ip", "PS_HOST_IP"))

    # Ours: reads by P2P
    p2p: Literal["auto", "on", "off"] = Field("auto", validation_alias=AliasChoices("p2p", "CKPT_ENGINE_P2P"))
    p2p_transport: Literal["auto", "rdma", "efa", "ascend_direct", "tcp"] = Field(
        "auto", validation_alias=AliasChoices("p2p_transport", "CKPT_ENGINE_P2P_TRANSPORT")
    )
    p2p_readers: int = Field(4, ge=1, validation_alias=AliasChoices("p2p_readers", "CKPT_ENGINE_P2P_READERS"))
    lease_timeout: float = Field(
        60, gt=0, validation_alias=AliasChoices("lease_timeout", "CKPT_ENGINE_LEASE_TIMEOUT")
    )

    # Ours: ports that a firewall lets through; else the system chooses
    lease_port: int | None = Field(
        None, ge=1, le=65535, validation_alias=AliasChoices("lease_port", "CKPT_ENGINE_LEASE_PORT")
    )
    control_port: int | None = Field(
        None, ge=1, le=65535, validation_alias=AliasChoices("control_port", "CKPT_ENGINE_CONTROL_PORT")
    )

    # Ours: what the command logs
    log_format: Literal["text", "json"] = Field(
        "text", validation_alias=AliasChoices("log_format", "CKPT_ENGINE_LOG_FORMAT")
    )

    # Ours: the slot ring
    slot_mib: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("slot_mib", "CKPT_ENGINE_SLOT_MIB")
    )
    # At most as many as a link between ranks takes notes about at once.
    slot_count: int = Field(
        3, ge=1, le=128, validation_alias=AliasChoices("slot_count", "CKPT_ENGINE_SLOT_COUNT")
    )

    # Ours: who this process is
    host_id_override: str | None = Field(
        None, validation_alias=AliasChoices("host_id_override", "CKPT_ENGINE_HOST_ID")
    )
    device_uuid: str | None = Field(
        None, validation_alias=AliasChoices("device_uuid", "CKPT_ENGINE_DEVICE_UUID")
    )
    cpu_devices: str | None = Field(
        None, validation_alias=AliasChoices("cpu_devices", "CKPT_ENGINE_CPU_DEVICES")
    )

    # Ours: where sockets live; deadlines, in seconds
    socket_dir: Path | None = Field(
        None, validation_alias=AliasChoices("socket_dir", "CKPT_ENGINE_SOCKET_DIR")
    )
    handshake_timeout: float = Field(
        120, gt=0, validation_alias=AliasChoices("handshake_timeout", "CKPT_ENGINE_HANDSHAKE_TIMEOUT")
    )
    reply_timeout: float = Field(
        120, gt=0, validation_alias=AliasChoices("reply_timeout", "CKPT_ENGINE_REPLY_TIMEOUT")
    )
    stall_timeout: float = Field(
        30, gt=2, validation_alias=AliasChoices("stall_timeout", "CKPT_ENGINE_STALL_TIMEOUT")
    )

    # Ours: whose groups carry the broadcasts
    custom_dist: Literal["auto", "vllm_nccl", "vllm_gloo", "vllm_hccl"] = Field(
        "auto", validation_alias=AliasChoices("custom_dist", "CKPT_ENGINE_CUSTOM_DIST")
    )
    release_groups: bool = Field(
        False, validation_alias=AliasChoices("release_groups", "CKPT_ENGINE_RELEASE_GROUPS")
    )

    # Ours: where each update's trace goes
    trace_dir: Path | None = Field(None, validation_alias=AliasChoices("trace_dir", "CKPT_ENGINE_TRACE_DIR"))

    verify: Verify = Field("off", validation_alias=AliasChoices("verify", "CKPT_ENGINE_VERIFY"))

    guard: bool = Field(False, validation_alias=AliasChoices("guard", "CKPT_ENGINE_GUARD"))

    # Ours: who may use the HTTP API
    api_token: SecretStr | None = Field(
        None, validation_alias=AliasChoices("api_token", "CKPT_ENGINE_API_TOKEN")
    )
    # ... and what requests may name: `server.access` reads both lists
    allowed_roots: str | None = Field(
        None, validation_alias=AliasChoices("allowed_roots", "CKPT_ENGINE_ALLOWED_ROOTS")
    )
    allowed_engines: str | None = Field(
        None, validation_alias=AliasChoices("allowed_engines", "CKPT_ENGINE_ALLOWED_ENGINES")
    )

    # Ours: host memory
    load_threads: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("load_threads", "CKPT_ENGINE_LOAD_THREADS")
    )
    huge_pages: bool | None = Field(
        None, validation_alias=AliasChoices("huge_pages", "CKPT_ENGINE_HUGE_PAGES")
    )
    numa: bool = Field(True, validation_alias=AliasChoices("numa", "CKPT_ENGINE_NUMA"))
    inplace_pin: bool = Field(False, validation_alias=AliasChoices("inplace_pin", "CKPT_ENGINE_INPLACE_PIN"))

    @field_validator(
        "master_addr", "socket_dir", "trace_dir", "allowed_roots", "allowed_engines", mode="before"
    )
    @classmethod
    def _not_empty(cls, value: object) -> object:
        # An empty address is every interface of the host, an empty path the working directory, and an empty
        # list could be meant as nothing, or as no list.
        if value == "":
            raise ValueError("must not be empty: unset it for the default")
        return value

    def slot_nbytes(self, device_type: str) -> int:
        """Bytes of a slot on such a device: the setting or its default, capped by PS_MAX_BUCKET_SIZE_GB."""
        mib = self.slot_mib if self.slot_mib is not None else DEFAULT_SLOT_MIB[device_type]
        nbytes = int(mib * MiB)
        if self.max_bucket_size_gb is not None:
            nbytes = min(nbytes, int(self.max_bucket_size_gb * GiB))
        return nbytes

    @cached_property
    def host_id(self) -> str:
        """The host's name in device UUIDs and metas."""
        return self.host_id_override or socket.gethostname()

    def local_cpu_index(self, index: int) -> int:
        """The host-wide index of an engine's `index`-th CPU device (CKPT_ENGINE_CPU_DEVICES)."""
        if self.cpu_devices is None:
            return index
        try:
            indices = [int(part) for part in self.cpu_devices.split(",")]
        except ValueError:
            indices = []
        if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
            raise ConfigError(
                f"CKPT_ENGINE_CPU_DEVICES={self.cpu_devices!r}: give distinct indices from 0 up, "
                "separated by commas, such as '2,3'"
            )
        if not 0 <= index < len(indices):
            raise ConfigError(
                f"CKPT_ENGINE_CPU_DEVICES={self.cpu_devices!r} lists {len(indices)} devices, "
                f"but this process asks for number {index}"
            )
        return indices[index]


def load_settings() -> Settings:
    """Reads the environment.

    Raises:
        ConfigError: a variable is not what it may be; the message names each one.
    """
    return _settings_of(tuple(map(os.environ.get, _VARIABLES)))


@lru_cache(maxsize=1)
def _settings_of(environment: tuple[str | None, ...]) -> Settings:
    """Checked once for each environment: a worker needs them at every update."""
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"{_variable(str(item['loc'][0]))}={item['input']!r}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise ConfigError(f"bad environment: {problems}") from None


def _variable(field: str) -> str:
    """The environment variable of a field."""
    alias = Settings.model_fields[field].validation_alias
    assert isinstance(alias, AliasChoices)
    return str(alias.choices[-1])


_VARIABLES = tuple(
    str(choice)
    for field in Settings.model_fields.values()
    if isinstance(field.validation_alias, AliasChoices)
    for choice in field.validation_alias.choices
)
