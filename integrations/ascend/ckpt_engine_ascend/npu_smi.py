"""`npu-smi`: how it is asked, and what its answers mean. Nothing here decides anything.

Two answers matter. `info -m` is a table of chips; its columns differ between products, so they are found by
the names in its header. `info -t proc-mem -i N` lists the processes of one NPU; the 910 family writes a
chip's number *after* its processes, the 310 family *before* them, and the 950 not at all. What fits neither
order, or stops in the middle, is marked as unclear instead of being guessed at. With `-c CHIP` it lists
those of one chip, without numbers. All messages, errors too, go to stdout; what libraries say on stderr is
kept apart, so that it never stands in the middle of a line.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

CALL_SECONDS = 10.0
"""How long one call may take; a healthy one takes well under a second."""
SHOWN_CHARACTERS = 2000
"""How much of one answer an error message repeats."""

_PROCESS = re.compile(
    r"\s*Process id\s*:\s*([0-9]+)\s+(?:Process name\s*:.*?)??Process memory\(MB\)\s*:\s*([0-9]+)\s*"
)
_NUMBER_OF = re.compile(r"\s*(NPU ID|Total Count|Chip Count|Card Count|Chip ID)\s*:\s*([0-9]+)\s*")
_NO_PROCESS = "No process in device."
_CHIP_FAILED = "Failed to query npu chip"
_NO_CARD = "Invalid card id."
_DIGITS = re.compile(r"[0-9]+")
_COLUMNS = {"NPU ID": "npu", "Chip ID": "chip", "Chip Logic ID": "logic", "Chip Phy-ID": "phy"}


@dataclass(frozen=True)
class Answer:
    """One call. `status`: its exit status, or None where it could not be run or did not end in time; then
    `problem` says why. `errors`: what came on stderr."""

    arguments: tuple[str, ...]
    output: str
    status: int | None
    problem: str = ""
    errors: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 0

    def describe(self) -> str:
        """The command, how it ended, and what it printed."""
        ended = self.problem or f"exit status {self.status}"
        both = (text.strip("\n") for text in (self.output, self.errors))
        said = "\n".join(filter(None, both))[:SHOWN_CHARACTERS] or "(nothing)"
        return f"`npu-smi {' '.join(self.arguments)}`, {ended}, printed:\n{said}"


@dataclass(frozen=True)
class Chip:
    """A row of `info -m`. `logic_id`: the container's number; `phy_id`: the host's. None: not told."""

    npu_id: int
    chip_id: int
    logic_id: int | None = None
    phy_id: int | None = None


@dataclass(frozen=True)
class Processes:
    """Who uses an NPU: chip -> {pid: MB}. Under None: processes whose chip is unclear.

    `complete`: whether nothing is missing, so far as the answer itself can tell. `chip_count`: how many chips
    the NPU says it has; None: not told.
    """

    by_chip: Mapping[int | None, Mapping[int, int]]
    complete: bool
    chip_count: int | None = None


@dataclass
class NpuSmi:
    """The tool of this container. Remembers every answer that was no use, for an error's message."""

    seconds: float = CALL_SECONDS
    useless: list[Answer] = field(default_factory=list)
    _list: tuple[Answer, Mapping[int, int | None] | None] | None = None

    def ask(self, *arguments: str) -> Answer:
        """Runs `npu-smi ARGUMENTS`; never raises."""
        program = shutil.which("npu-smi")
        if program is None:
            return Answer(arguments, "", None, "not found on PATH, or not executable")
        try:
            done = subprocess.run(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=self.seconds,
            )
        except subprocess.TimeoutExpired as error:
            late = f"no end within {self.seconds:g} s"
            return Answer(arguments, _text(error.stdout), None, late, _text(error.stderr))
        except OSError as error:
            return Answer(arguments, "", None, f"could not be run: {error}")
        return Answer(arguments, _text(done.stdout), done.returncode, "", _text(done.stderr))

    def chips(self) -> list[Chip]:
        """All chips that this container sees: from `info -m`, or `info -l` where the tool does not know that;
        empty when neither tells."""
        table = self.ask("info", "-m")
        chips = parse_chips(table.output) if table.ok else []
        if chips:
            return chips
        self.useless.append(table)
        if table.ok or table.status is None:
            return []  # there is a table, which may name the physical ids: the cards alone would not do
        cards = self.cards()
        if not cards and self._list is not None:
            self.useless.append(self._list[0])
        # One chip where it does not say how many.
        return [Chip(card, chip) for card, count in (cards or {}).items() for chip in range(count or 1)]

    def processes(self, npu_id: int) -> Processes:
        """The processes of one NPU; none, and not complete, where the call failed or made no sense."""
        answer = self.ask("info", "-t", "proc-mem", "-i", str(npu_id))
        found = parse_processes(answer.output, npu_id) if answer.ok else None
        if found is None:
            # A card that is not here has no process of ours; any other failure may hide one.
            found = Processes({}, complete=_NO_CARD in answer.output)
        if not (found.complete and answer.ok):
            self.useless.append(answer)
        return found

    def processes_by_chip(
        self, npu_id: int, chip_ids: Collection[int]
    ) -> Mapping[int | None, Mapping[int, int]] | None:
        """The same, asked chip by chip, so that no order of rows matters; None where not every chip answers
        (older tools do not know the question)."""
        by_chip: dict[int | None, Mapping[int, int]] = {}
        for chip_id in chip_ids:
            answer = self.ask("info", "-t", "proc-mem", "-i", str(npu_id), "-c", str(chip_id))
            found = parse_processes_of_chip(answer.output, npu_id, chip_id) if answer.ok else None
            if found is None:
                return None
            by_chip[chip_id] = found
        return by_chip

    def cards(self) -> Mapping[int, int | None] | None:
        """The NPUs of `info -l`, with how many chips each says that it has (None: not told); empty where the
        answer makes no sense, None where the tool has none."""
        if self._list is None:
            answer = self.ask("info", "-l")
            self._list = answer, parse_cards(answer.output) if answer.ok else None
        return self._list[1]


def parse_chips(text: str) -> list[Chip]:
    """The rows of `info -m`; empty when there is no such table, or it was cut short.

    A controller's row (its logic or physical number is `-`) is no chip.
    """
    if not text.endswith("\n"):
        return []
    columns: list[str] = []
    chips = []
    for line in _lines(text):
        cells = re.split(r"\s{2,}", line.strip())
        if not columns:
            columns = cells if {"NPU ID", "Chip ID"} <= set(cells) else []
            continue
        # A row with a cell missing would shift the others; so would one of another table.
        if len(cells) != len(columns):
            continue
        row = {_COLUMNS[name]: cell for name, cell in zip(columns, cells, strict=True) if name in _COLUMNS}
        if all(_DIGITS.fullmatch(cell) for cell in row.values()):
            numbers = {name: int(cell) for name, cell in row.items()}
            chips.append(Chip(numbers["npu"], numbers["chip"], numbers.get("logic"), numbers.get("phy")))
    return chips


def parse_cards(text: str) -> dict[int, int | None]:
    """The NPUs of `info -l`, with their counts of chips (None: not told); empty when it was cut short."""
    counts: dict[int, int | None] = {}
    card = total = None
    for line in _lines(text):
        match = _NUMBER_OF.fullmatch(line)
        if not match:
            continue
        if match[1] == "Total Count":
            total = int(match[2])
        elif match[1] == "NPU ID":
            card = int(match[2])
            counts[card] = None
        elif match[1] in ("Chip Count", "Card Count") and card is not None:
            counts[card] = int(match[2])
    return counts if text.endswith("\n") and total in (None, len(counts)) else {}


_Row = Mapping[int, int] | int
"""A process ({pid: MB}, or {} for none of them), or the number of a chip."""


def parse_processes(text: str, npu_id: int) -> Processes | None:
    """The answer of `info -t proc-mem -i npu_id`; None when it is no such answer, or of another NPU."""
    whole = text.endswith("\n")
    lines = _lines(text)
    rows: list[_Row] = []
    told_id = told_count = None
    for line in lines:
        number = _NUMBER_OF.fullmatch(line)
        process = _PROCESS.fullmatch(line)
        if told_id is None and (process or _NO_PROCESS in line or (number and number[1] != "NPU ID")):
            whole = False  # the answer does not begin with its NPU: lines are missing, or are another's
        if process:
            rows.append({int(process[1]): int(process[2])})
        elif _NO_PROCESS in line or _CHIP_FAILED in line:
            rows.append({})
            whole = whole and _CHIP_FAILED not in line
        elif number and number[1] == "Chip ID":
            rows.append(int(number[2]))
        elif number and number[1] == "Chip Count":
            whole = whole and told_count is None
            told_count = int(number[2])
        elif number and number[1] == "NPU ID":
            if told_id is not None:
                return None  # two answers in one
            told_id = int(number[2])
        elif "Process id" in line:
            whole = False  # a process, but not one that can be read
    if told_id != npu_id or not rows:
        return None
    by_chip = _grouped(rows)
    closed = not lines[-1].strip()  # an empty line ends each chip's part
    if by_chip is None and not any(isinstance(row, int) for row in rows) and told_count in (None, 1):
        # The 950 names no chips: it has one.
        return Processes({0: _merged(rows)}, whole and closed and told_count is None, told_count)
    if by_chip is None or (told_count is not None and max(chip or 0 for chip in by_chip) >= told_count):
        return Processes({None: _merged(rows)}, complete=False, chip_count=told_count)
    if told_count is None or not isinstance(rows[-1], int):
        whole = whole and closed  # more processes of the last chip, or another chip, may be missing
    return Processes(by_chip, whole and told_count in (None, len(by_chip)), told_count)


def parse_processes_of_chip(text: str, npu_id: int, chip_id: int) -> dict[int, int] | None:
    """The answer of `info -t proc-mem -i npu_id -c chip_id`: {pid: MB}; None when it is no such answer, or
    was cut short."""
    rows: list[_Row] = []
    for line in _lines(text):
        number = _NUMBER_OF.fullmatch(line)
        process = _PROCESS.fullmatch(line)
        if process:
            rows.append({int(process[1]): int(process[2])})
        elif _NO_PROCESS in line:
            rows.append({})
        elif "Process id" in line or _CHIP_FAILED in line:
            return None
        elif number and int(number[2]) != {"NPU ID": npu_id, "Chip ID": chip_id}.get(number[1]):
            return None  # no number is expected; but if there is one, it must not be another's
    return _merged(rows) if rows and text.endswith("\n") else None


def _grouped(rows: list[_Row]) -> dict[int | None, Mapping[int, int]] | None:
    """Chip -> its processes, where the order of the rows has one meaning only; else None."""
    if isinstance(rows[0], int) == isinstance(rows[-1], int):
        return None  # cut off: a list begins or ends with a chip's number, never both, never neither
    ordered = rows if isinstance(rows[-1], int) else rows[::-1]
    grouped: dict[int | None, Mapping[int, int]] = {}
    pending: list[_Row] = []
    for row in ordered:
        if not isinstance(row, int):
            pending.append(row)
        elif row in grouped or not pending:
            return None
        else:
            grouped[row] = _merged(pending)
            pending = []
    return grouped


def _merged(rows: list[_Row]) -> dict[int, int]:
    merged: dict[int, int] = {}
    for row in rows:
        if not isinstance(row, int):
            for pid, megabytes in row.items():
                merged[pid] = max(megabytes, merged.get(pid, 0))
    return merged


def _lines(text: str) -> list[str]:
    """The whole ones. (`splitlines` would also cut at bytes that a process may have in its name.)"""
    return [line.removesuffix("\r") for line in text.split("\n")[:-1]]


def _text(output: bytes | None) -> str:
    return (output or b"").decode("utf-8", "replace")
