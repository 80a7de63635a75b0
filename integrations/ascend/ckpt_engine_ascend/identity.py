"""Which NPU is this: the key that the parameter server and the engine's worker compute alike.

    device_uuid(index)     # "NPU-10.0.0.7-5"

The number is the chip's on its host (`npu_id * chips_per_npu + chip_id` on uniform machines, which is what
the reference computes), so that both sides may run in different containers, and a fleet may mix. Ways to it:

1. CKPT_ENGINE_DEVICE_UUID, as it is, but for torch's index of the device in the place of `{index}`.
2. `npu-smi info -t proc-mem` lists this very pid on a chip. The driver shows a container its own pids, but a
   privileged one the host's, among which ours may be somebody else's: there this way leads nowhere.
3. `npu-smi info -m` says which chip has this process' logic id. 2 must not contradict it.

Either the right key or an `IdentityError` with what npu-smi printed: a wrong one would send weights to
another device's worker, or make an update wait for a worker that never comes.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_engine.errors import ConfigError, DeviceError
from ckpt_engine.settings import Settings, load_settings
from ckpt_engine_ascend.npu_smi import Answer, Chip, NpuSmi

logger = logging.getLogger(__name__)

ALL_CALLS_SECONDS = 60.0
"""How long all calls may take together; NPUs that were not asked by then count as silent."""
_SHOWN_ANSWERS = 4
_HOSTS_PIDS = "pid:[4026531836]"
"""The kernel's own number of the first namespace of pids."""
_CAP_SYS_ADMIN = 1 << 21
"""Privileged containers have it, others rarely."""
_PLACE = "{index}"
_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"

_WAYS_OUT = (
    ("not found on PATH", "mount it (-v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi, or /usr/local/sbin)"),
    (
        "error while loading shared libraries",
        "mount /usr/local/dcmi and /usr/local/Ascend/driver/lib64, and put the latter's common and driver "
        "folders on LD_LIBRARY_PATH",
    ),
    (
        "-8005",
        "load the driver, add the user to the driver's group (HwHiAiUser), mount /usr/local/dcmi, and see "
        "that no other container holds the devices",
    ),
    ("-8002", "run as root in the container, or add the user to the driver's group (HwHiAiUser)"),
    ("-8020", "another container holds the device: stop it, or switch device sharing on"),
    ("does not support querying proc-mem", "this product lists no processes: name the device yourself"),
    ("no end within", "npu-smi hangs: see whether it answers in a shell, and look at the driver's log"),
)


NAME_IT = (
    "Or set CKPT_ENGINE_DEVICE_UUID to the same text for this device's parameter server and worker, such as "
    "NPU-x-{index}, where several workers share an environment."
)


class IdentityError(DeviceError):
    """It cannot be told which NPU this process uses; the message has npu-smi's output and the way out."""


@dataclass(frozen=True)
class _Hit:
    """The process is listed there. `chip`: None where it is not clear which one of the NPU."""

    npu_id: int
    chip: Chip | None
    megabytes: int

    def __str__(self) -> str:
        return f"NPU {self.npu_id} chip {self.chip.chip_id if self.chip else 'unknown'}"


@dataclass
class _Listed:
    """Where a process is listed. `certain`: nothing is missing, every NPU has answered completely.
    `chip_counts`: what those that answered say of themselves."""

    hits: list[_Hit] = field(default_factory=list)
    certain: bool = True
    chip_counts: dict[int, int] = field(default_factory=dict)


def device_uuid(index: int | None = None, *, settings: Settings | None = None) -> str:
    """`NPU-{ip}-{number}` of npu:`index`, or CKPT_ENGINE_DEVICE_UUID.

    CKPT_ENGINE_HOST_ID takes the address' place where it is set. The process should have used the device:
    npu-smi lists it only then. The answer is remembered.

    Args:
        index: torch's index of the device; None: the current one, where torch_npu has been initialised.

    Raises:
        IdentityError: it cannot be told.
        ConfigError: ASCEND_RT_VISIBLE_DEVICES does not fit the index, or CKPT_ENGINE_DEVICE_UUID has an
            `{index}` that is not known.
    """
    settings = settings or load_settings()
    index = _current_index() if index is None else index
    if settings.device_uuid:
        return _named(settings.device_uuid, index)
    logic_id = None if index is None else logic_id_of(index, os.environ)
    key = (os.getpid(), logic_id)
    number = _NUMBERS.get(key)
    if number is None:
        number = chip_number(os.getpid(), logic_id, NpuSmi(), own_pids=sees_own_pids())
        if logic_id is not None:  # else another device may be meant the next time
            _NUMBERS[key] = number
    return f"NPU-{settings.host_id_override or host_ip()}-{number}"


def _named(text: str, index: int | None) -> str:
    """The operator's word, with the index where it says `{index}`: several workers share an environment."""
    if _PLACE not in text:
        return text
    if index is None:
        raise ConfigError(f"CKPT_ENGINE_DEVICE_UUID={text!r}: this process has no current NPU yet")
    return text.replace(_PLACE, str(index))


_NUMBERS: dict[tuple[int, int | None], int] = {}
"""(pid, logic id) -> the chip's number. The pid, because a child is not its parent."""


def sees_own_pids(proc: Path = Path("/proc/self")) -> bool:
    """Whether the driver shows pids as this process knows them: on the host, and in ordinary containers."""
    if os.readlink(proc / "ns" / "pid") == _HOSTS_PIDS:
        return True
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", (proc / "status").read_text(), re.MULTILINE)
    return capabilities is not None and not int(capabilities[1], 16) & _CAP_SYS_ADMIN


def logic_id_of(index: int, environment: Mapping[str, str]) -> int:
    """The container's number of torch's npu:`index`, as ASCEND_RT_VISIBLE_DEVICES orders them.

    Raises:
        ConfigError: the variable has no such place, or an order that CANN refuses.
    """
    value = environment.get(_VISIBLE)
    if value is None:
        return index
    # CANN and torch_npu read up to the first character that is neither a digit nor a comma.
    readable = value[: next((at for at, char in enumerate(value) if char not in "0123456789,"), None)]
    ids: list[int] = []
    for part in readable.split(","):
        if not part:
            break
        ids.append(int(part))
    if any(later <= earlier for earlier, later in itertools.pairwise(ids)):
        raise ConfigError(f"{_VISIBLE}={value!r}: the ids must ascend, else CANN sees no device at all")
    if not 0 <= index < len(ids):
        raise ConfigError(f"{_VISIBLE}={value!r} names {len(ids)} devices; there is no npu:{index}")
    return ids[index]


def chip_number(pid: int, logic_id: int | None, smi: NpuSmi, *, own_pids: bool) -> int:
    """The host's number of the chip that process `pid`, on its container's device `logic_id`, uses.

    Args:
        own_pids: whether npu-smi lists pids as this process knows them (`sees_own_pids`).

    Raises:
        IdentityError: it cannot be told for certain.
    """
    chips = smi.chips()
    if not chips:
        raise _error(pid, logic_id, "npu-smi lists no NPU", smi.useless)
    own = _own_chip(pid, logic_id, chips, smi)
    if own is None and not own_pids:
        why = (
            "npu-smi names no logic ids here, and its pids are the host's: this one would be another process'"
        )
        raise _error(pid, logic_id, why, smi.useless)
    # The host's pids say nothing of a process that is known by its logic id.
    listed_on = _listed(pid, chips, own, smi) if own_pids or own is None else _Listed()
    cards = smi.cards() if own is None else None
    if cards is not None and cards.keys() != {chip.npu_id for chip in chips}:
        listed_on.certain = False  # it may be on an NPU that the table lacks, because it was cut short
    if own is None and not listed_on.certain:
        raise _error(pid, logic_id, "an answer of npu-smi's is missing, unclear or incomplete", smi.useless)
    chip = _chosen(pid, logic_id, own, listed_on.hits, smi)
    number = _number(pid, logic_id, chip, chips, listed_on.chip_counts.get(chip.npu_id), smi)
    for answer in smi.useless:
        logger.warning("looking for this process' NPU: %s", answer.describe())
    return number


def _own_chip(pid: int, logic_id: int | None, chips: Sequence[Chip], smi: NpuSmi) -> Chip | None:
    """The chip with the process' own logic id; None where none is known."""
    if logic_id is None or all(chip.logic_id is None for chip in chips):
        return None
    own = [chip for chip in chips if chip.logic_id == logic_id]
    if len(own) == 1:
        return own[0]
    listed = ", ".join(str(chip.logic_id) for chip in chips)
    why = f"`npu-smi info -m` lists {len(own)} chips with this logic id, of the logic ids {listed}"
    raise _error(pid, logic_id, why, smi.useless)


def _number(
    pid: int, logic_id: int | None, chip: Chip, chips: Sequence[Chip], told: int | None, smi: NpuSmi
) -> int:
    """The chip's number on its host. `told`: how many chips its NPU says that it has."""
    numbers = _numbers(chips)
    count = sum(other.npu_id == chip.npu_id for other in chips)
    if chip.phy_id is None and chip.npu_id:
        # The formula needs the count of chips, of which a table that was cut short lacks some.
        told = (smi.cards() or {}).get(chip.npu_id) if told is None else told
        told = smi.processes(chip.npu_id).chip_count if told is None else told
        if told != count:
            counts = "nothing else says how many there are" if told is None else f"elsewhere it says {told}"
            why = f"`npu-smi info -m` lists {count} chips of NPU {chip.npu_id}, and {counts}"
            raise _error(pid, logic_id, why, smi.useless)
    if list(numbers.values()).count(numbers[chip]) > 1:
        why = "chips of different cards would get the same number here, and npu-smi names no physical ids"
        raise _error(pid, logic_id, why, smi.useless)
    formula = chip.npu_id * count + chip.chip_id
    if numbers[chip] != formula:
        logger.warning(
            "NPU %d chip %d has the physical id %d, and would be %d where npu-smi names none: see that the "
            "parameter server and the engine use the same npu-smi, or set CKPT_ENGINE_DEVICE_UUID for both",
            chip.npu_id,
            chip.chip_id,
            numbers[chip],
            formula,
        )
    return numbers[chip]


def _numbers(chips: Sequence[Chip]) -> dict[Chip, int]:
    """Each chip's number on its host: its physical id, or the reference's formula where none is told."""
    per_npu = {chip.npu_id: sum(other.npu_id == chip.npu_id for other in chips) for chip in chips}
    return {
        chip: chip.npu_id * per_npu[chip.npu_id] + chip.chip_id if chip.phy_id is None else chip.phy_id
        for chip in chips
    }


def _listed(pid: int, chips: Sequence[Chip], own: Chip | None, smi: NpuSmi) -> _Listed:
    """Its own NPU is asked first: listed on its own chip, nobody else needs to be asked."""
    ends = time.monotonic() + ALL_CALLS_SECONDS
    ids = list(dict.fromkeys(chip.npu_id for chip in ([own] if own else []) + list(chips)))
    listed = _Listed()
    for npu_id in ids:
        if time.monotonic() > ends:
            smi.useless.append(
                Answer(("info", "-t", "proc-mem", "-i", str(npu_id)), "", None, "not asked: too late")
            )
            listed.certain = False
            break
        _ask(pid, npu_id, [chip for chip in chips if chip.npu_id == npu_id], own, smi, listed)
        if own is not None and any(hit.chip == own for hit in listed.hits):
            listed.hits = [hit for hit in listed.hits if hit.chip == own]
            break
    return listed


def _ask(
    pid: int, npu_id: int, chips: Sequence[Chip], own: Chip | None, smi: NpuSmi, listed: _Listed
) -> None:
    """Adds what the NPU with these `chips` has to say."""
    found = smi.processes(npu_id)
    if found.chip_count is not None:
        listed.chip_counts[npu_id] = found.chip_count
    by_chip: Mapping[int | None, Mapping[int, int]] = found.by_chip
    # Chips of the table that the answer lacks may be where the process is.
    complete = found.complete and (not by_chip or {chip.chip_id for chip in chips} <= by_chip.keys())
    on = {chip_id for chip_id, processes in by_chip.items() if pid in processes}
    if own is None and on and len(chips) > 1:
        # Which chip a process is on, the order of rows alone tells: ask again, without one.
        asked = smi.processes_by_chip(npu_id, [chip.chip_id for chip in chips]) or {}
        complete = complete and on == {chip_id for chip_id in asked if pid in asked[chip_id]}
        by_chip = asked if complete else by_chip
    listed.certain = listed.certain and complete
    for chip_id in on:
        if chip_id is None and own is not None and own.npu_id == npu_id:
            chip_id = own.chip_id
        chip = next((chip for chip in chips if chip.chip_id == chip_id), None)
        # Not in the table, or on a chip that the answer does not tell: no ground to stand on.
        listed.certain = listed.certain and chip is not None
        listed.hits.append(_Hit(npu_id, chip, by_chip.get(chip_id, {}).get(pid, 0)))


def _chosen(pid: int, logic_id: int | None, own: Chip | None, hits: Sequence[_Hit], smi: NpuSmi) -> Chip:
    if own is not None and all(hit.chip == own for hit in hits):
        return own  # listed there, or nowhere: then these are the host's pids
    if own is not None:
        why = (
            f"npu-smi lists this pid on {', '.join(map(str, hits))}, but by its logic id the process is on "
            f"NPU {own.npu_id} chip {own.chip_id} (was {_VISIBLE} changed since it started? Or are these the "
            "host's pids, and another process there has this one?)"
        )
        raise _error(pid, logic_id, why, smi.useless)
    if not hits:
        why = "npu-smi does not list this pid (in a privileged container it shows the host's pids)"
        raise _error(pid, logic_id, why, smi.useless)
    largest = max(hit.megabytes for hit in hits)
    first, *others = [hit for hit in hits if hit.megabytes == largest]
    if others or first.chip is None:
        why = f"npu-smi lists this pid on {len(others) + 1} chips with {largest} MB each"
        raise _error(pid, logic_id, why, smi.useless)
    return first.chip


def host_ip() -> str:
    """This host's address, found as the reference finds it: its route to the world. No packet is sent.

    Raises:
        IdentityError: this host has neither a route nor a name with an address.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("8.8.8.8", 80))
            return str(sock.getsockname()[0])
    except OSError:
        name = socket.gethostname()
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise IdentityError(
            f"this host has no route, and its name {name!r} has no address ({error}): set "
            "CKPT_ENGINE_HOST_ID to the same name for the parameter servers and the engine"
        ) from error


def _current_index() -> int | None:
    npu = getattr(sys.modules.get("torch_npu"), "npu", None)
    return int(npu.current_device()) if npu is not None and npu.is_initialized() else None


def ways_out(said: str) -> str:
    """Sentences with what to do about npu-smi's answers; empty where nothing is known of them."""
    hints = [hint for sign, hint in _WAYS_OUT if sign in said]
    return " ".join(f"{hint[0].upper()}{hint[1:]}." for hint in hints)


def _error(pid: int, logic_id: int | None, why: str, useless: Sequence[Answer]) -> IdentityError:
    shown = list(useless[:_SHOWN_ANSWERS])
    said = "\n".join(answer.describe() for answer in shown)
    device = "" if logic_id is None else f", logic device {logic_id}"
    text = f"cannot tell which NPU this process (pid {pid}{device}, on {socket.gethostname()}) uses: {why}. "
    text += " ".join(filter(None, (ways_out(said), NAME_IT)))
    if said:
        text += f"\n{said}"
    if len(useless) > len(shown):
        text += f"\n({len(useless) - len(shown)} more answers like these)"
    return IdentityError(text)
