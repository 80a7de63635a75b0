"""npu-smi's answers in any order, with unknown lines, cut anywhere: the right chip or an error.

Every drawn machine is printed as the tool prints it, and then damaged. hypothesis prints what failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from ckpt_engine_ascend import IdentityError
from ckpt_engine_ascend.identity import chip_number
from ckpt_engine_ascend.npu_smi import (
    Answer,
    Chip,
    NpuSmi,
    parse_cards,
    parse_chips,
    parse_processes,
    parse_processes_of_chip,
)
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
        mine = [chip for n, chip in self.processes if n == npu]
        lines = [pair("NPU ID", npu), pair("Chip Count", len(mine)), ""]
        for chip in mine:
            rows, number = self.rows((npu, chip)), pair("Chip ID", chip)
            lines += [*rows, number, ""] if self.numbers_after else [number, *rows, ""]
        return lines

    def rows(self, place: tuple[int, int]) -> list[str]:
        """Answers `info -t proc-mem -i npu -c chip`."""
        return [
            f"\tProcess id:{pid:<7d} Process name:{self.name:<17s} Process memory(MB):{megabytes}"
            for pid, megabytes in self.processes[place].items()
        ] or ["\tNo process in device."]

    def cards(self) -> list[str]:
        """Answers `info -l`."""
        npus = sorted({npu for npu, _ in self.processes})
        counts = [sum(npu == n for n, _ in self.processes) for npu in npus]
        lines = [pair("Total Count", len(npus)), ""]
        for npu, count in zip(npus, counts, strict=True):
            lines += [pair("NPU ID", npu), pair("Chip Count", count), ""]
        return lines


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    per_npu = draw(st.integers(1, 3))
    npus = draw(st.lists(st.sampled_from([0, 1, 2, 5, 8, 32768]), min_size=1, max_size=4, unique=True))
    places = draw(st.permutations([(npu, chip) for npu in npus for chip in range(per_npu)]))
    processes = {place: draw(st.dictionaries(PIDS, st.integers(1, 65536), max_size=4)) for place in places}
    return Machine(processes, draw(st.booleans()), draw(st.booleans()), draw(NAMES))


class Told(NpuSmi):
    """Answers from a machine; `damage` makes an answer of its lines. `old`: knows neither `-l` nor `-c`.
    `failing`: NPUs that do not answer."""

    def __init__(
        self,
        machine: Machine,
        damage: Callable[[tuple[str, ...], list[str]], str],
        *,
        old: bool = False,
        failing: Mapping[int, Answer] | None = None,
    ) -> None:
        super().__init__()
        self.machine, self.damage, self.old, self.failing = machine, damage, old, failing or {}
        self.asked: list[tuple[str, ...]] = []

    def ask(self, *arguments: str) -> Answer:
        self.asked.append(arguments)
        match arguments:
            case ("info", "-m"):
                lines = self.machine.table()
            case ("info", "-l") if not self.old:
                lines = self.machine.cards()
            case ("info", "-t", "proc-mem", "-i", npu, *_) if int(npu) in self.failing:
                return self.failing[int(npu)]
            case ("info", "-t", "proc-mem", "-i", npu):
                lines = self.machine.listing(int(npu))
            case ("info", "-t", "proc-mem", "-i", npu, "-c", chip) if not self.old:
                lines = self.machine.rows((int(npu), int(chip)))
            case _:
                return Answer(arguments, "Error parameter of info\n", 215)
        return Answer(arguments, self.damage(arguments, lines), 0)


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
        found = chip_number(pid, logic_id, smi, own_pids=True)
    except IdentityError:
        assert right is None or not must_find
        return
    assert found == right


def logic_ids(machine: Machine) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(0, len(machine.processes) - 1)


def right_or_own(machine: Machine, pid: int, logic_id: int | None) -> int | None:
    """The same where damage may hide a contradiction: what is left then says what the mapping says."""
    right = expected(machine, pid, logic_id)
    return machine.number(machine.chips()[logic_id]) if right is None and logic_id is not None else right


@settings(max_examples=300, deadline=None)
@given(machines(), PIDS, st.data())
def test_an_undamaged_answer_gives_the_right_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    logic_id = data.draw(logic_ids(machine))
    old = data.draw(st.booleans())
    # Which of several chips it is, an old tool's order of rows alone would tell.
    by_order = any(
        pid in used and (npu, 1) in machine.processes for (npu, _), used in machine.processes.items()
    )
    must_find = not (old and logic_id is None and by_order)
    check(Told(machine, whole, old=old), pid, logic_id, expected(machine, pid, logic_id), must_find=must_find)


@settings(max_examples=300, deadline=None)
@given(machines(), PIDS, st.data())
def test_unknown_lines_change_nothing(machine: Machine, pid: int, data: st.DataObject) -> None:
    def noisy(arguments: tuple[str, ...], lines: list[str]) -> str:
        return whole(
            arguments, [text for line in lines for text in (*data.draw(st.lists(NOISE, max_size=2)), line)]
        )

    logic_id = data.draw(logic_ids(machine))
    check(Told(machine, noisy), pid, logic_id, expected(machine, pid, logic_id), must_find=True)


@settings(max_examples=800, deadline=None)
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

    logic_id = data.draw(logic_ids(machine))
    smi = Told(machine, cut, old=data.draw(st.booleans()))
    check(smi, pid, logic_id, right_or_own(machine, pid, logic_id), must_find=False)


@settings(max_examples=500, deadline=None)
@given(machines(), PIDS, st.data())
def test_a_cut_table_never_gives_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    """Rows that are missing altogether cannot be told from cards that are not there, but for the list of
    cards, which may be cut as well."""

    def cut(arguments: tuple[str, ...], lines: list[str]) -> str:
        text = whole(arguments, lines)
        return data.draw(beginnings(text)) if arguments[1] in ("-m", "-l") else text

    logic_id = data.draw(logic_ids(machine))
    check(Told(machine, cut), pid, logic_id, right_or_own(machine, pid, logic_id), must_find=False)


@settings(max_examples=500, deadline=None)
@given(machines(), PIDS, st.data())
def test_rows_in_any_order_never_give_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    """Shuffled, a list of processes says nothing of chips, and may look as if it did: asked for one chip at a
    time, npu-smi contradicts it; a tool that cannot be asked so is not believed."""

    def shuffled(arguments: tuple[str, ...], lines: list[str]) -> str:
        if arguments[1] == "-m":
            header, *rows = lines
            return whole(arguments, [header, *data.draw(st.permutations(rows))])
        if arguments[1] == "-l" or "-c" in arguments:
            return whole(arguments, lines)
        if data.draw(st.booleans()):
            return whole(arguments, data.draw(st.permutations(lines)))
        # Those that look in order: processes and chips change places, all else stays.
        body = [at for at, line in enumerate(lines) if at > 1 and line]
        places = dict(zip(body, data.draw(st.permutations(body)), strict=True))
        return whole(arguments, [lines[places.get(at, at)] for at in range(len(lines))])

    logic_id = data.draw(logic_ids(machine))
    smi = Told(machine, shuffled, old=data.draw(st.booleans()))
    check(smi, pid, logic_id, right_or_own(machine, pid, logic_id), must_find=False)


@settings(max_examples=500, deadline=None)
@given(machines(), PIDS, st.data())
def test_two_answers_in_one_never_give_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    """The rows of another NPU's answer, or of the same one again, between those of an answer; then cut."""

    def mixed(arguments: tuple[str, ...], lines: list[str]) -> str:
        if "proc-mem" not in arguments or "-c" in arguments:
            return whole(arguments, lines)
        other = machine.listing(data.draw(st.sampled_from(machine.chips()))[0])
        turns = data.draw(st.permutations([0] * len(lines) + [1] * len(other)))
        of = iter(lines), iter(other)
        return data.draw(beginnings(whole(arguments, [next(of[turn]) for turn in turns])))

    logic_id = data.draw(logic_ids(machine))
    smi = Told(machine, mixed, old=data.draw(st.booleans()))
    check(smi, pid, logic_id, right_or_own(machine, pid, logic_id), must_find=False)


FAILURES = [
    Answer((), "Failed to query npu chip: 0 info.\n", 211),
    Answer((), "This device does not support querying proc-mem.\n", 217),
    Answer((), "\tNPU ID", None, "no end within 10 s"),
    Answer((), "", 0),
]
NO_CARD = Answer((), "Invalid card id.\nError parameter of -i\n", 215)


@settings(max_examples=500, deadline=None)
@given(machines(), PIDS, st.data())
def test_a_silent_npu_never_gives_another_chip(machine: Machine, pid: int, data: st.DataObject) -> None:
    """The process may be on the NPU that does not answer; unless that one says that it is not here at all."""
    npus = sorted({npu for npu, _ in machine.processes})
    silent = data.draw(st.lists(st.sampled_from(npus), unique=True))
    smi = Told(machine, whole, failing={npu: data.draw(st.sampled_from(FAILURES)) for npu in silent})
    logic_id = data.draw(logic_ids(machine))
    check(smi, pid, logic_id, right_or_own(machine, pid, logic_id), must_find=False)

    absent = [
        npu for npu in npus if not any(pid in machine.processes[at] for at in machine.chips() if at[0] == npu)
    ]
    smi = Told(machine, whole, failing=dict.fromkeys(absent, NO_CARD))
    check(smi, pid, None, expected(machine, pid, None), must_find=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=400), st.integers(0, 9))
def test_any_text_is_read_without_a_crash(text: str, npu: int) -> None:
    parse_processes(text, npu)
    parse_processes_of_chip(text, npu, 0)
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


@pytest.mark.parametrize("file", ["a2_8npu__procmem_0", "a3_8x2__procmem_0", "a5__procmem_0"])
def test_an_answer_that_ends_within_a_line_is_incomplete(file: str) -> None:
    """Also where it does not say how many chips there are, which would tell it as well."""
    text = (SAMPLES / f"{file}.txt").read_text()
    text = "".join(line for line in text.splitlines(keepends=True) if "Chip Count" not in line)
    found = parse_processes(text, 0)
    assert found is not None
    assert found.complete
    for end in range(1, len(text)):
        cut = parse_processes(text[:end], 0)
        assert text[end - 1] == "\n" or cut is None or not cut.complete, text[:end]


def test_the_tables_columns_are_found_by_name() -> None:
    chips = parse_chips((SAMPLES / "a3_container_npu2__info_m.txt").read_text())
    assert chips == [Chip(2, 0, logic_id=0, phy_id=4), Chip(2, 1, logic_id=1, phy_id=5)]
    assert parse_chips((SAMPLES / "a5__info_m.txt").read_text()) == [Chip(0, 0, phy_id=0)]
    assert parse_cards((SAMPLES / "a3_8x2__info_l.txt").read_text()) == dict.fromkeys(range(8), 2)


def test_tables_that_end_within_a_line_are_none() -> None:
    """Rows are missing, of which an old tool says nothing elsewhere."""
    for file, parse in (("a3_8x2__info_m", parse_chips), ("a3_8x2__info_l", parse_cards)):
        text = (SAMPLES / f"{file}.txt").read_text()
        assert parse(text)
        for end in range(1, len(text)):
            assert text[end - 1] == "\n" or not parse(text[:end])


def test_an_answer_about_another_npu_is_none() -> None:
    text = (SAMPLES / "a2_8npu__procmem_0.txt").read_text()
    assert parse_processes(text, 0) is not None
    assert parse_processes(text, 1) is None


def test_two_answers_in_one_are_none() -> None:
    """The 950 says neither how many chips there are nor which: nothing else would tell."""
    text = (SAMPLES / "a5__procmem_0.txt").read_text()
    other = text.replace(pair("NPU ID", 0), pair("NPU ID", 1)).replace("395864", "395865")
    assert other != text
    assert parse_processes(other, 1) is not None
    for both in (text + other, other + text):
        assert parse_processes(both, 0) is None


def test_without_chip_numbers_the_only_chip_is_0() -> None:
    found = parse_processes((SAMPLES / "a5__procmem_0.txt").read_text(), 0)
    assert found is not None
    assert found.by_chip == {0: {395864: 5118}}


def test_numbers_that_two_cards_would_share_are_refused() -> None:
    """A card of two chips beside one of one, without physical ids: the reference's formula gives 4 twice."""
    machine = Machine({(2, 0): {7: 1}, (2, 1): {}, (4, 0): {}}, numbers_after=True, phy=False, name="python")
    with pytest.raises(IdentityError, match="the same number"):
        chip_number(7, 0, Told(machine, whole), own_pids=True)


def test_a_list_that_ends_behind_a_process_may_lack_others() -> None:
    """Where a chip's number comes first, all chips have been named before the last process is."""
    machine = Machine({(2, 0): {7: 1}, (2, 1): {8: 1, 7: 9}}, numbers_after=False, phy=False, name="python")
    lines = machine.listing(2)
    assert "Process id:7" in lines[-2]
    text = whole((), lines)
    cut = whole((), lines[:-2])
    assert [found.complete for found in map(parse_processes, (text, cut), (2, 2)) if found] == [True, False]
    smi = Told(machine, lambda arguments, all_lines: whole((), all_lines[:-2]), old=True)
    with pytest.raises(IdentityError, match="unclear or incomplete"):
        chip_number(7, None, smi, own_pids=True)


def test_a_table_that_lacks_a_chip_gives_no_number_of_another() -> None:
    """With one row of two, the formula would make 5 of NPU 5 chip 0, which is 10."""
    machine = Machine({(5, 0): {}, (5, 1): {7: 1}}, numbers_after=True, phy=False, name="python")

    def cut(arguments: tuple[str, ...], lines: list[str]) -> str:
        return whole(arguments, lines[:2] if arguments == ("info", "-m") else lines)

    for smi in (
        Told(machine, cut),
        Told(machine, cut, old=True),
        Told(machine, cut, failing={5: FAILURES[0]}),
    ):
        with pytest.raises(IdentityError, match="lists 1 chips of NPU 5, and elsewhere it says 2"):
            chip_number(8, 0, smi, own_pids=True)
    with pytest.raises(IdentityError, match="nothing else says how many"):
        chip_number(8, 0, Told(machine, cut, old=True, failing={5: FAILURES[0]}), own_pids=True)
    assert chip_number(8, 0, Told(machine, whole), own_pids=True) == 10


def test_pids_of_the_host_are_nobodys_here() -> None:
    """A privileged container: another process of the host may have this process' pid."""
    machine = Machine({(2, 0): {7: 9}, (3, 0): {}}, numbers_after=True, phy=False, name="python")
    smi = Told(machine, whole)
    assert chip_number(7, None, smi, own_pids=True) == 2
    with pytest.raises(IdentityError, match="its pids are the host's"):
        chip_number(7, None, smi, own_pids=False)
    assert chip_number(7, 0, smi, own_pids=False) == 2
    assert chip_number(7, 1, smi, own_pids=False) == 3
    with pytest.raises(
        IdentityError, match=r"by its logic id the process is on NPU 3 chip 0 \(was ASCEND_RT"
    ):
        chip_number(7, 1, smi, own_pids=True)


@pytest.mark.parametrize("old", [False, True])
def test_a_process_that_its_logic_id_tells_is_not_looked_for_among_the_hosts(old: bool) -> None:
    """Nor is any NPU asked for its processes, unless nothing else says how many chips it has."""
    machine = Machine({(npu, 0): {7: 1} for npu in range(8)}, numbers_after=True, phy=False, name="python")
    smi = Told(machine, whole, old=old)
    assert chip_number(7, 5, smi, own_pids=False) == 5
    asked = [arguments[-1] for arguments in smi.asked if "proc-mem" in arguments]
    assert asked == (["5"] if old else [])


def test_chips_that_are_told_by_the_order_of_rows_alone_are_not_told() -> None:
    """An old tool, and no logic id. Two processes have changed places, so that all looks well."""
    machine = Machine({(2, 0): {7: 5}, (2, 1): {8: 5}}, numbers_after=True, phy=False, name="python")

    def swapped(arguments: tuple[str, ...], lines: list[str]) -> str:
        if "proc-mem" in arguments and "-c" not in arguments:
            first, second = (at for at, line in enumerate(lines) if "Process id" in line)
            lines[first], lines[second] = lines[second], lines[first]
        return whole(arguments, lines)

    for damage in (swapped, whole):
        with pytest.raises(IdentityError, match="unclear or incomplete"):
            chip_number(7, None, Told(machine, damage, old=True), own_pids=True)
    assert chip_number(7, None, Told(machine, whole), own_pids=True) == 4


def test_a_logic_id_that_two_chips_have_is_refused() -> None:
    machine = Machine({(2, 0): {}, (3, 0): {}}, numbers_after=True, phy=False, name="python")

    def twice(arguments: tuple[str, ...], lines: list[str]) -> str:
        return whole(arguments, [*lines, lines[1]] if arguments == ("info", "-m") else lines)

    with pytest.raises(IdentityError, match="lists 2 chips with this logic id, of the logic ids 0, 1, 0"):
        chip_number(7, 0, Told(machine, twice), own_pids=True)


def test_a_name_that_looks_like_a_row_is_no_row() -> None:
    """A process may call itself anything: bytes at which Python would end a line, too."""
    for name in ("\vProcess id:9", "\x1cChip ID : 0", "\u2028a"):
        machine = Machine({(2, 0): {7: 1}, (2, 1): {8: 1}}, numbers_after=True, phy=False, name=name)
        found = parse_processes(whole((), machine.listing(2)), 2)
        assert found is not None
        assert found.by_chip == {0: {7: 1}, 1: {8: 1}}
        assert found.complete


def test_physical_ids_that_the_formula_would_not_give_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The other side of a device, with an npu-smi that names none, would come to another number."""
    machine = Machine({(2, 0): {7: 1}, (3, 0): {}}, numbers_after=True, phy=True, name="python")
    assert chip_number(7, 0, Told(machine, whole), own_pids=True) == 100
    assert "has the physical id 100, and would be 2 where npu-smi names none" in caplog.text
