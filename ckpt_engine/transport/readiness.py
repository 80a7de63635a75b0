"""What `ckpt-engine doctor` says of P2P and of ports: mooncake, locked memory, which ports are taken."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from ckpt_engine.findings import Finding, Level, installed_version
from ckpt_engine.settings import GiB, Settings
from ckpt_engine.transport.bootstrap import host_ip
from ckpt_engine.transport.verbs import list_devices

WHEELS = (
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine-npu",
)


def find(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """mooncake, the address that others read at, and the ports that the settings fix."""
    yield mooncake(settings)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield memory_lock(soft, has_rdma=bool(list_devices()))
    yield Finding("address", Level.OK, settings.host_ip or host_ip(settings.master_addr))
    for what, port, variable in ports(settings):
        yield port_is_free(what, port, variable)


def mooncake(settings: Settings) -> Finding:
    """Its wheels, all of which hold the package `mooncake`."""
    if settings.p2p == "off":
        return Finding("mooncake", Level.OK, "CKPT_ENGINE_P2P is off: nothing is read by P2P")
    found = [f"{name} {there}" for name in WHEELS if (there := installed_version(name)) is not None]
    if find_spec("mooncake") is None:
        return Finding(
            "mooncake",
            Level.ERROR if settings.p2p == "on" else Level.OK,
            "is not installed: nothing can be read by P2P"
            + (", as CKPT_ENGINE_P2P asks" * (settings.p2p == "on")),
            "pip install 'ckpt-engine[p2p]', [p2p-cpu] without CUDA, or [p2p-npu]",
        )
    if len(found) > 1:
        message = f"{', '.join(found)} are installed, of which one has overwritten another"
        return Finding("mooncake", Level.WARNING, message, "pip uninstall all of them, and install one again")
    wheel = found[0] if found else "an unknown build"
    if find_spec("torch_npu") is not None and "npu" not in wheel:
        return Finding(
            "mooncake", Level.WARNING, f"{wheel} knows no NPUs", "pip install 'ckpt-engine[p2p-npu]'"
        )
    asked = "" if settings.p2p_transport == "auto" else f", over {settings.p2p_transport}"
    return Finding("mooncake", Level.OK, wheel + asked)


def ports(settings: Settings) -> Iterator[tuple[str, int, str]]:
    """`(what listens there, port, what chooses it)` of this host, as far as the settings fix them."""
    local_size = settings.local_world_size or 1
    if settings.lease_port is not None:
        for local_rank in range(local_size):
            yield (
                f"leases of local rank {local_rank}",
                settings.lease_port + local_rank,
                "CKPT_ENGINE_LEASE_PORT",
            )
    if (settings.rank or 0) == 0:
        if settings.control_port is not None:
            yield "control server", settings.control_port, "CKPT_ENGINE_CONTROL_PORT"
        if settings.master_port is not None:
            yield "control store", settings.master_port + 1, "MASTER_PORT (+ 1)"


def port_is_free(what: str, port: int, variable: str) -> Finding:
    """Whether `what` could listen there. A job that runs is no error."""
    subject = f"port {port}"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except (OSError, OverflowError) as error:
            remedy = f"unless a job of yours has it now, choose another: {variable}"
            return Finding(subject, Level.WARNING, f"the {what} cannot have it: {error}", remedy)
    return Finding(subject, Level.OK, f"free for the {what}")


def memory_lock(limit_nbytes: int, *, has_rdma: bool) -> Finding:
    """RDMA devices' memory is locked by this process, up to a limit; CUDA's driver pins without one."""
    if limit_nbytes == resource.RLIM_INFINITY:
        return Finding("locked memory", Level.OK, "no limit")
    message = f"at most {limit_nbytes / GiB:.2f} GiB (ulimit -l)"
    if not has_rdma:
        return Finding("locked memory", Level.OK, f"{message}, which counts for RDMA devices only")
    return Finding(
        "locked memory",
        Level.WARNING,
        f"{message}: RDMA devices cannot read a larger share",
        "raise it: docker run --ulimit memlock=-1, LimitMEMLOCK=infinity, or memlock in limits.conf",
    )
