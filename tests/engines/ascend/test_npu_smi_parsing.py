"""npu-smi's answers in any order, with unknown lines, cut anywhere: the right chip or an error.

Every drawn machine is printed as the tool prints it, and then damaged. hypothesis prints what failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from ckpt_engine_ascend import IdentityError
from ckpt_engine_ascend.identity import chip_number
from ckpt_engine_ascend.npu_smi import Answer, Chip, NpuSmi, parse_cards, parse_chips, parse_processes
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.ascend.conftest import FAKE_NPU_SMI

SAMPLES = FAKE_NPU_SMI.parent / "samples"
PIDS = st.sampled_from([12, 123, 1234, 23])
NAMES = st.sampled_from(["python", "", "VLLM::Worker_TP", "my app", "id:123", "Chip ID : 1"])
NOISE = st.sampled_from(
    [
        "",
        "\tGet pid name failed.",
        "[WARNING]The driver package may not be completely installed",
        "\tfuture : 1",
        "\t",
    ]
)


def cells(*values: object) -> str:
    return "\t" + "".join(f"{value!s:<30} " for value in values)


def pair(name: str, value: int) -> str:
    return f"\t{name:<30} : {value}"


@dataclass(frozen=True)
class Machine:
    """(npu, chip) -> {pid: MB}. `numbers_after`: the 910's order; `phy`: with A3's column."""

    processes: dict[tuple[int, int], dict[int, int]]
    numbers_after: bool
    phy: bool
    name: str

    def chips(self) -> list[tuple[int, int]]:
        return sorted(self.processes)

    def number(self, place: tuple[int, int]) -> int:
        """What the host calls a chip."""
        count = len({chip for npu, chip in self.processes if npu == place[0]})
        return 100 + self.chips().index(place) if self.phy else place[0] * count + place[1]

    def table(self) -> list[str]:
        """Answers `info -m`."""
        columns = ["NPU ID", "Chip ID", "Chip Logic ID", *(["Chip Phy-ID"] if self.phy else []), "Chip Name"]
        lines = [cells(*columns)]
        for logic, (npu, chip) in enumerate(self.chips()):
            phy = [self.number((npu, chip))] if self.phy else []
            lines.append(cells(npu, chip, logic, *phy, "Ascend 910B3"))
        return [*lines, cells(0, 9, "-", *(["-"] if self.phy else []), "Mcu")]

    def listing(self, npu: int) -> list[str]:
        """Answers `info -t proc-mem -i npu`."""
        mine = {chip: used for (n, chip), used in self.processes.items() if n == npu}
        lines = [pair("NPU ID", npu), pair("Chip Count", len(mine)), ""]
        for chip, used in mine.items():
            rows = [
                f"\tProcess id:{pid:<7d} Process name:{self.name:<17s} Process memory(MB):{megabytes}"
                for pid, megabytes in used.items()
            ] or ["\tNo process in device."]
            number = pair("Chip ID", chip)
            lines += [*rows, number, ""] if self.numbers_after else [number, *rows, ""]
        return lines


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    per_npu = draw(st.integers(1, 3))
    npus = draw(st.lists(st.sampled_from([0, 1, 2, 5, 8, 32768]), min_size=1, max_size=4, unique=True))
    places = draw(st.permutations([(npu, chip) for npu in npus for chip in range(per_npu)]))
    processes = {place: draw(st.dictionaries(PIDS, st.integers(1, 65536), max_size=4)) for place in places}
    return Machine(processes, draw(st.booleans()), draw(st.booleans()), draw(NAMES))


class Told(NpuSmi):
    """Answers from a machine; `damage` makes an answer of its lines."""

    def __init__(self, machine: Machine, damage: Callable[[tuple[str, ...], list[str]], str]) -> None:
        super().__init__()
        self.machine, self.damage = machine, damage

    def ask(self, *arguments: str) -> Answer:
        if arguments == ("info", "-m"):
            return Answer(arguments, self.damage(arguments, self.machine.table()), 0)
        if arguments[:3] == ("info", "-t", "proc-mem"):
            return Answer(arguments, self.damage(arguments, self.machine.listing(int(arguments[-1]))), 0)
        return Answer(arguments, "Error parameter of info\n", 215)


def beginnings(text: str) -> st.SearchStrategy[str]:
    """All of it, or cut after any line, or anywhere."""
    lines = text.splitlines(keepends=True)
    return (
        st.just(text)
        | st.integers(0, len(lines)).map(lambda end: "".join(lines[:end]))
        | st.integers(0, len(text)).map(lambda end: text[:end])
    )


def whole(arguments: tuple[str, ...], lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def expected(machine: Machine, pid: int, logic_id: int | None) -> int | None:
    """The chip's number; None where nothing but an error may come."""
    places = [place for place, used in machine.processes.items() if pid in used]
    if logic_id is not None:
        own = machine.chips()[logic_id]
        return machine.number(own) if own in places or not places else None
    if not places:
        return None
    largest = max(machine.processes[place][pid] for place in places)
    first, *others = [place for place in places if machine.processes[place][pid] == largest]
    return None if others else machine.number(first)


def check(smi: NpuSmi, pid: int, logic_id: int | None, right: int | None, must_find: bool) -> None:
    try:
        found = chip_number(pid, logic_id, smi)
    except IdentityError:
        assert right is None or not must_find
        return
    assert found == right


@settings(max_examples=300, deadline=None)
@given(machines(), PIDS, st.data())
def test_an_undamaged_answer_gives_the_right_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    logic_id = data.draw(st.none() | st.integers(0, len(machine.processes) - 1))
    check(Told(machine, whole), pid, logic_id, expected(machine, pid, logic_id), must_find=True)


@settings(max_examples=300, deadline=None)
@given(machines(), PIDS, st.data())
def test_unknown_lines_change_nothing(machine: Machine, pid: int, data: st.DataObject) -> None:
    def noisy(arguments: tuple[str, ...], lines: list[str]) -> str:
        return whole(
            arguments, [text for line in lines for text in (*data.draw(st.lists(NOISE, max_size=2)), line)]
        )

    logic_id = data.draw(st.none() | st.integers(0, len(machine.processes) - 1))
    check(Told(machine, noisy), pid, logic_id, expected(machine, pid, logic_id), must_find=True)


@settings(max_examples=1500, deadline=None)
@given(machines(), PIDS, st.data())
def test_a_cut_answer_never_gives_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    """Each list of processes may end anywhere, unknown lines between its own. Known or unknown logic id: the
    right chip, or an error."""

    def cut(arguments: tuple[str, ...], lines: list[str]) -> str:
        if arguments == ("info", "-m"):
            return whole(arguments, lines)
        # No empty ones: those are how a chip's part ends.
        noise = st.lists(NOISE.filter(str.strip), max_size=1)
        return data.draw(
            beginnings(whole(arguments, [text for line in lines for text in (*data.draw(noise), line)]))
        )

    logic_id = data.draw(st.none() | st.integers(0, len(machine.processes) - 1))
    right = expected(machine, pid, logic_id)
    if logic_id is not None and right is None:
        # A contradiction, which the cut may hide; what is left then says what the mapping says.
        right = machine.number(machine.chips()[logic_id])
    check(Told(machine, cut), pid, logic_id, right, must_find=False)


@settings(max_examples=300, deadline=None)
@given(machines(), PIDS, st.data())
def test_a_cut_table_never_gives_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    def cut(arguments: tuple[str, ...], lines: list[str]) -> str:
        text = whole(arguments, lines)
        # Rows that are missing altogether cannot be told from cards that are not there.
        return data.draw(beginnings(text)) if arguments == ("info", "-m") else text

    logic_id = data.draw(st.integers(0, len(machine.processes) - 1))
    right = expected(machine, pid, logic_id)
    if right is None:
        right = machine.number(machine.chips()[logic_id])  # as above
    check(Told(machine, cut), pid, logic_id, right, must_find=False)


@settings(max_examples=300, deadline=None)
@given(machines(), PIDS, st.data())
def test_rows_in_any_order_never_give_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    """Shuffled, a list of processes says nothing about chips, unless it still is in one of the two orders."""

    def shuffled(arguments: tuple[str, ...], lines: list[str]) -> str:
        if arguments == ("info", "-m"):
            header, *rows = lines
            return whole(arguments, [header, *data.draw(st.permutations(rows))])
        head, rows = lines[:2], [line for line in lines[3:] if line]
        return whole(arguments, [*head, "", *data.draw(st.permutations(rows)), ""])

    logic_id = data.draw(st.integers(0, len(machine.processes) - 1))
    places = [npu for (npu, _), used in machine.processes.items() if pid in used]
    own = machine.chips()[logic_id]
    # What can be said: an answer is the chip of the logic id, and only if the pid is not on other NPUs alone.
    try:
        found = chip_number(pid, logic_id, Told(machine, shuffled))
    except IdentityError:
        return
    assert found == machine.number(own)
    assert not places or own[0] in places


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=400), st.integers(0, 9))
def test_any_text_is_read_without_a_crash(text: str, npu: int) -> None:
    parse_processes(text, npu)
    parse_chips(text)
    parse_cards(text)


@pytest.mark.parametrize("file", sorted(SAMPLES.glob("*procmem_*.txt")), ids=lambda file: file.stem)
def test_every_sample_of_processes_is_read_to_its_end(file: object) -> None:
    text = (SAMPLES / str(file)).read_text()
    npu = int(str(file).split("procmem_")[1].split(".")[0].split("_")[0])
    found = parse_processes(text, npu)
    if "invalid" in str(file):
        assert found is None
        return
    assert found is not None
    assert found.complete
    assert sum(map(len, found.by_chip.values())) == text.count("Process id:")


def test_the_tables_columns_are_found_by_name() -> None:
    chips = parse_chips((SAMPLES / "a3_container_npu2__info_m.txt").read_text())
    assert chips == [Chip(2, 0, logic_id=0, phy_id=4), Chip(2, 1, logic_id=1, phy_id=5)]
    assert parse_chips((SAMPLES / "a5__info_m.txt").read_text()) == [Chip(0, 0, phy_id=0)]
    assert parse_cards((SAMPLES / "a3_8x2__info_l.txt").read_text()) == [
        Chip(npu, chip) for npu in range(8) for chip in range(2)
    ]


def test_an_answer_about_another_npu_is_none() -> None:
    text = (SAMPLES / "a2_8npu__procmem_0.txt").read_text()
    assert parse_processes(text, 0) is not None
    assert parse_processes(text, 1) is None


def test_without_chip_numbers_the_only_chip_is_0() -> None:
    found = parse_processes((SAMPLES / "a5__procmem_0.txt").read_text(), 0)
    assert found is not None
    assert found.by_chip == {0: {395864: 5118}}


def test_numbers_that_two_cards_would_share_are_refused() -> None:
    """A card of two chips beside one of one, without physical ids: the reference's formula gives 4 twice."""
    machine = Machine({(2, 0): {7: 1}, (2, 1): {}, (4, 0): {}}, numbers_after=True, phy=False, name="python")
    with pytest.raises(IdentityError, match="the same number"):
        chip_number(7, 0, Told(machine, whole))


def test_a_list_that_ends_behind_a_process_may_lack_others() -> None:
    """Where a chip's number comes first, all chips have been named before the last process is."""
    machine = Machine({(2, 0): {7: 1}, (2, 1): {8: 1, 7: 9}}, numbers_after=False, phy=False, name="python")
    lines = machine.listing(2)
    assert "Process id:7" in lines[-2]
    text = whole((), lines)
    cut = whole((), lines[:-2])
    assert [found.complete for found in map(parse_processes, (text, cut), (2, 2)) if found] == [True, False]
    with pytest.raises(IdentityError, match="unclear or incomplete"):
        chip_number(7, None, Told(machine, lambda arguments, all_lines: whole((), all_lines[:-2])))


def test_a_table_that_lacks_a_chip_gives_no_number_of_another() -> None:
    """With one row of two, the formula would make 5 of NPU 5 chip 0, which is 10."""
    machine = Machine({(5, 0): {}, (5, 1): {7: 1}}, numbers_after=True, phy=False, name="python")

    def cut(arguments: tuple[str, ...], lines: list[str]) -> str:
        return whole(arguments, lines[:2] if arguments == ("info", "-m") else lines)

    with pytest.raises(IdentityError, match="lists 1 chips of NPU 5, `-t proc-mem` counts 2"):
        chip_number(8, 0, Told(machine, cut))
    assert chip_number(8, 0, Told(machine, whole)) == 10
