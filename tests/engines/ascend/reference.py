"""Which NPU, in every scenario of npu_smi/: the right answer, ours, and that of the reference's own function.

    python -m tests.engines.ascend.reference            # prints the table of integrations/ascend/README.md

The reference is checkpoint-engine as PyPI has it (`--reference` takes wheels in its place), unmodified, in a
process and a folder of its own: `checkpoint_engine.device_utils.npu_generate_uuid`. Both are asked by the
process ids of the samples, on the same fake npu-smi.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt_engine_ascend.identity import IdentityError, chip_number
from ckpt_engine_ascend.npu_smi import NpuSmi

from benchmarks.compare import REFERENCE, install

HERE = Path(__file__).parent
TOOL = HERE / "npu_smi" / "bin"
NOT_LISTED = 999983
"""No sample has this pid."""
MISSING = "(npu-smi is missing)"
NOT_RUNNING = "The current process is not running on the npu device"
"""Of the reference, whatever was in the way."""


@dataclass(frozen=True)
class Case:
    """A process in a scenario. `index`: its container's number of the device, None: unknown. `right`: the
    host's number of the chip, or what an error must repeat of npu-smi's words."""

    scenario: str
    situation: str
    pid: int
    index: int | None
    right: int | str

    @property
    def shown(self) -> str:
        return self.scenario.removesuffix("_with_table")


CASES = (
    Case("a2_8npu", "8 NPUs of one chip", 4242, 0, 0),
    Case("a2_idle_with_table", "the process has not used its NPU yet", NOT_LISTED, 0, 0),
    Case("a2_16npu", "NPU 12 of 16", 9012, 12, 12),
    Case("a2_substring_trap", "pid 123 on NPU 5, pid 12345 on NPU 0", 123, 5, 5),
    Case("a2_pid_on_two_npus", "a stray context on NPU 0, the work on NPU 3", 4242, 3, 3),
    Case("a2_container_npu5", "a container that has NPU 5 only", 812, 0, 5),
    Case("a2_privileged_hostpid", "a privileged container: the host's pids", NOT_LISTED, 2, 2),
    Case("a3_8x2", "8 NPUs of two chips", 3229015, 15, 15),
    Case("a3_half_idle_with_table", "one of two chips is idle", 3229095, 1, 1),
    Case("a3_container_npu2", "a container that has NPU 2 only", 845, 1, 5),
    Case("a5", "Ascend 950, which numbers no chips", 395864, None, 0),
    Case("odd_card_id_with_table", "NPU ids that do not count from 0", 1654605, 1, 65537),
    Case("dcmi_fail", "the driver is not there", NOT_LISTED, 0, "ret is -8005"),
    Case("device_used", "another container has the device", NOT_LISTED, 0, "ret is -8020"),
    Case("no_permission", "the user may not ask", NOT_LISTED, 0, "ret is -8002"),
    Case("unsupported_with_table", "a product that lists no processes", NOT_LISTED, 0, 0),
    Case("chip_query_fail_with_table", "a chip that does not answer", NOT_LISTED, 0, 0),
    Case("phyid_remap", "a tool that only maps physical ids", NOT_LISTED, 5, "Invalid card id."),
    Case(MISSING, "not mounted", NOT_LISTED, 0, "not found on PATH"),
)


@contextmanager
def npu_smi(scenario: str) -> Iterator[None]:
    """npu-smi answers as in that scenario, meanwhile."""
    before = dict(os.environ)
    tool = f"{TOOL}{os.pathsep}" if scenario != MISSING else ""
    os.environ |= {"PATH": tool + os.environ["PATH"], "FAKE_NPU_SMI_SCENARIO": scenario}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def answer(ask: Callable[[], int]) -> int | str:
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 - how it fails is the answer
        return f"{type(error).__name__}: {error}"


def ask_ours(case: Case) -> int | str:
    """The number; or its error, which must be the one that says so."""
    own_pids = case.scenario != "a2_privileged_hostpid"
    with npu_smi(case.scenario):
        found = answer(lambda: chip_number(case.pid, case.index, NpuSmi(), own_pids=own_pids))
    assert isinstance(found, int) or found.startswith(IdentityError.__name__), found
    return found


def ask_reference(packages: Path) -> list[int | str]:
    """Of all cases."""
    command = [sys.executable, "-m", "tests.engines.ascend.reference", "--answer"]
    paths = [str(packages), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=HERE.parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers: list[int | str] = json.loads(done.stdout)
    return answers


def answer_as_reference() -> None:
    """In the process where the reference is importable."""
    from checkpoint_engine.device_utils import npu_generate_uuid

    answers = []
    for case in CASES:
        os.getpid = lambda case=case: case.pid
        with npu_smi(case.scenario):
            answers.append(answer(lambda: int(npu_generate_uuid().rpartition("-")[2])))
    sys.stdout.write(json.dumps(answers))


def shown(case: Case, found: int | str) -> str:
    """An answer in the table."""
    if isinstance(found, int):
        return str(found)
    if isinstance(case.right, str) and case.right in found:
        return f"an error with `{case.right}`"
    return f"`{found.splitlines()[0]}`"


def verdict(case: Case, found: int | str) -> str:
    """What is to be said of the reference's answer."""
    if found == case.right or (isinstance(case.right, str) and case.right in str(found)):
        return "right"
    if isinstance(found, int):
        return f"wrong: {found}"
    return "misleading" if NOT_RUNNING in found else f"not caught: {shown(case, found)}"


def row(case: Case, ours: int | str, reference: int | str) -> str:
    right = f"an error with `{case.right}`" if isinstance(case.right, str) else str(case.right)
    return f"| {case.shown} | {case.situation} | {right} | {shown(case, ours)} | {verdict(case, reference)} |"


def table(references: Sequence[int | str]) -> Iterator[str]:
    yield "| scenario | situation | right | ours | the reference |"
    yield "|---|---|---|---|---|"
    for case, reference in zip(CASES, references, strict=True):
        yield row(case, ask_ours(case), reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", nargs="+", default=REFERENCE, help="requirements, or wheels")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer_as_reference()
        return
    with tempfile.TemporaryDirectory() as packages:
        install(tuple(arguments.reference), Path(packages))
        references = ask_reference(Path(packages))
    sys.stdout.writelines(f"{line}\n" for line in table(references))


if __name__ == "__main__":
    main()
