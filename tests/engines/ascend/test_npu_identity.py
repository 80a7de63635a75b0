"""Which NPU: every scenario of cases.json through the fake npu-smi, and what may stand in the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ckpt_engine_ascend import IdentityError, device_uuid, identity
from ckpt_engine_ascend.npu_smi import NpuSmi

from ckpt_engine.compat.checkpoint_engine.device_utils import npu_generate_uuid
from ckpt_engine.errors import ConfigError
from tests.engines.ascend import reference
from tests.engines.ascend.conftest import FAKE_NPU_SMI, IP

CASES = FAKE_NPU_SMI.parent / "cases.json"

# scenario, the sample's pid that is ours (None: not listed), torch's index (None: unknown), the chip's number
FOUND = [
    ("a2_8npu", 4242, None, 0),
    ("a2_8npu", 4242, 0, 0),
    ("a2_8npu", None, 6, 6),
    ("a2_16npu", 9012, None, 12),
    ("a2_16npu", 9012, 12, 12),
    ("a2_16npu_list_only", 9015, None, 15),
    ("a2_substring_trap", 123, None, 5),
    ("a2_substring_trap", 123, 5, 5),
    ("a2_pid_on_two_npus", 4242, None, 3),
    ("a2_pid_on_two_npus", 4242, 3, 3),
    ("a2_pid_on_two_npus", 4242, 0, 0),
    ("a2_container_npu5", 812, None, 5),
    ("a2_container_npu5", 812, 0, 5),
    ("a2_container_npu5", None, 0, 5),
    ("a2_privileged_hostpid", None, 2, 2),
    ("a3_8x2", 3229000, None, 0),
    ("a3_8x2", 3229001, None, 1),
    ("a3_8x2", 3229014, None, 14),
    ("a3_8x2", 3229015, 15, 15),
    ("a3_container_npu2", 824, None, 4),
    ("a3_container_npu2", 845, None, 5),
    ("a3_container_npu2", 845, 1, 5),
    ("a3_container_npu2", None, 1, 5),
    ("a3_half_idle_with_table", 3229095, None, 1),
    ("a3_half_idle_with_table", 3229095, 1, 1),
    ("a2_idle_with_table", None, 0, 0),
    ("odd_card_id_with_table", 577293, None, 65536),
    ("odd_card_id_with_table", 1654605, 1, 65537),
    ("a5", 395864, None, 0),
    ("unsupported_with_table", None, 0, 0),
    ("chip_query_fail_with_table", None, 0, 0),
]

# scenario, pid, index, what the message must say: npu-smi's own words, and the way out
REFUSED = [
    (
        "dcmi_fail",
        None,
        0,
        ("dcmi module initialize failed. ret is -8005", "exit status 187", "oad the driver"),
    ),
    ("device_used", None, 0, ("the device is used. ret is -8020", "nother container holds the device")),
    ("no_permission", None, 0, ("ret is -8002", "un as root")),
    ("unsupported", None, 0, ("Invalid card id.", "CKPT_ENGINE_DEVICE_UUID")),
    (
        "unsupported_with_table",
        None,
        None,
        ("does not support querying proc-mem", "name the device yourself"),
    ),
    ("chip_query_fail", None, None, ("Invalid card id.",)),
    ("chip_query_fail_with_table", None, None, ("Failed to query npu chip: 0 info.", "exit status 211")),
    ("a2_idle", None, None, ("lists no NPU", "Invalid card id.")),
    ("a2_idle_with_table", None, None, ("does not list this pid",)),
    ("a3_half_idle", 3229095, 1, ("lists no NPU",)),
    ("odd_card_id", 577293, 0, ("lists no NPU",)),
    ("phyid_remap", None, 5, ("lists no NPU",)),
    ("a2_privileged_hostpid", None, None, ("does not list this pid", "privileged container")),
    (
        "a2_privileged_hostpid",
        None,
        8,
        ("0 chips with this logic id, of the logic ids 0, 1, 2, 3, 4, 5, 6, 7",),
    ),
    ("a2_substring_trap", 123, 2, ("NPU 5 chip 0", "by its logic id the process is on NPU 2")),
    ("a5", None, 0, ("does not list this pid",)),
]


def test_every_scenario_is_tried() -> None:
    there = {case["scenario"] for case in json.loads(CASES.read_text())}
    assert len({name for name in there if not name.endswith(("_with_table", "_list_only"))}) == 18
    assert there == {name for name, *_ in [*FOUND, *REFUSED]}


@pytest.mark.parametrize(("name", "pid", "index", "number"), FOUND)
def test_the_right_npu(
    scenario: Callable[..., None], name: str, pid: int | None, index: int | None, number: int
) -> None:
    scenario(name, pid)
    assert device_uuid(index) == f"NPU-{IP}-{number}"


def test_an_npu_that_failed_is_told_where_another_way_led_on(
    scenario: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    scenario("chip_query_fail_with_table")
    assert device_uuid(0) == f"NPU-{IP}-0"
    assert "Failed to query npu chip: 0 info." in caplog.text
    assert "exit status 211" in caplog.text


@pytest.mark.parametrize(("name", "pid", "index", "says"), REFUSED)
def test_an_error_with_the_output_and_the_way_out(
    scenario: Callable[..., None], name: str, pid: int | None, index: int | None, says: tuple[str, ...]
) -> None:
    scenario(name, pid)
    with pytest.raises(IdentityError) as raised:
        device_uuid(index)
    for text in (*says, f"pid {os.getpid()}", "CKPT_ENGINE_DEVICE_UUID"):
        assert text in str(raised.value)


def test_the_readmes_table_says_what_is_answered_now() -> None:
    """Its last column, the reference's answers, is of the command that prints it all."""
    there = {case["scenario"] for case in json.loads(CASES.read_text())}
    plain = {name for name in there if not name.endswith(("_with_table", "_list_only"))}
    assert {case.shown for case in reference.CASES} == {*plain, reference.MISSING}
    lines = (Path(__file__).parents[3] / "integrations/ascend/README.md").read_text().splitlines()
    for case in reference.CASES:
        ours = reference.ask_ours(case)
        assert ours == case.right or (isinstance(case.right, str) and case.right in str(ours))
        assert case.scenario == reference.MISSING or is_tried(case)
        (row,) = [line for line in lines if line.startswith(f"| {case.shown} |")]
        assert row.startswith(reference.row(case, ours, 0).rpartition(" | ")[0])


def is_tried(case: reference.Case) -> bool:
    """The table's answers are those of the tests above."""
    if isinstance(case.right, int):
        pid = None if case.pid == reference.NOT_LISTED else case.pid
        return (case.scenario, pid, case.index, case.right) in FOUND
    return any((case.scenario, case.index) == (name, index) for name, _, index, _ in REFUSED)


def test_the_reference_is_judged_by_what_it_says() -> None:
    npu, error = reference.CASES[0], reference.CASES[-1]
    misleading = f"ValueError: {reference.NOT_RUNNING}"
    crash = "FileNotFoundError: No such file or directory: 'npu-smi'"
    for case, answer, judged in (
        (npu, 0, "right"),
        (npu, 3, "wrong: 3"),
        (npu, misleading, "misleading"),
        (error, misleading, "misleading"),
        (error, 0, "wrong: 0"),
        (error, crash, f"not caught: `{crash}`"),
        (error, "IdentityError: not found on PATH", "right"),
    ):
        assert reference.verdict(case, answer) == judged


def test_what_sglang_asks_is_the_same_key(scenario: Callable[..., None]) -> None:
    scenario("a3_container_npu2", 845)
    assert f"NPU-{npu_generate_uuid()}" == device_uuid(None) == f"NPU-{IP}-5"


def test_both_sides_agree_whichever_way_they_went(scenario: Callable[..., None]) -> None:
    """The engine in a container that shows its pids, the parameter server in a privileged one."""
    scenario("a3_container_npu2", 845)
    engine = device_uuid(1)
    identity._NUMBERS.clear()
    scenario("a3_8x2")
    assert device_uuid(5) == engine == f"NPU-{IP}-5"


@pytest.mark.parametrize(
    ("visible", "index", "logic_id"),
    [("4,5,6", 1, 5), ("7", 0, 7), ("0,2,x,3", 1, 2), ("3,,5", 0, 3), (None, 6, 6)],
)
def test_visible_devices_choose_the_logic_id(
    scenario: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    index: int,
    logic_id: int,
) -> None:
    scenario("a2_privileged_hostpid")
    if visible is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert device_uuid(index) == f"NPU-{IP}-{logic_id}"


@pytest.mark.parametrize(
    ("visible", "index", "says"),
    [
        ("5,4", 0, "must ascend"),
        ("1,1", 0, "must ascend"),
        ("4,5", 2, "no npu:2"),
        ("", 0, "names 0 devices"),
    ],
)
def test_visible_devices_that_cann_refuses(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, visible: str, index: int, says: str
) -> None:
    scenario("a2_privileged_hostpid")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=says):
        device_uuid(index)


def test_the_operators_word_wins(scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    scenario("dcmi_fail")
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-mine")
    assert device_uuid(0) == "NPU-mine"


def test_workers_that_share_an_environment_get_keys_of_their_own(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario("dcmi_fail")
    monkeypatch.setenv("CKPT_ENGINE_DEVICE_UUID", "NPU-x-{index}")
    assert [device_uuid(index) for index in (0, 1)] == ["NPU-x-0", "NPU-x-1"]
    with pytest.raises(ConfigError, match="no current NPU yet"):
        device_uuid(None)


def test_npu_smi_is_not_there(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(IdentityError, match=r"not found on PATH[^*]*") as raised:
        device_uuid(0)
    assert "ount it (-v /usr/local/bin/npu-smi" in str(raised.value)


def make_tool(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str, mode: int = 0o755) -> None:
    tool = directory / "npu-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(mode)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def test_npu_smi_must_not_be_run(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_tool(tmp_path, monkeypatch, "exit 0", mode=0o644)
    with pytest.raises(IdentityError, match="not executable"):
        device_uuid(0)


def test_npu_smi_lacks_its_library(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_tool(
        tmp_path,
        monkeypatch,
        "echo 'npu-smi: error while loading shared libraries: libdrvdsmi_host.so: cannot open' >&2; exit 127",
    )
    with pytest.raises(IdentityError, match="libdrvdsmi_host") as raised:
        device_uuid(0)
    assert "LD_LIBRARY_PATH" in str(raised.value)


def test_npu_smi_hangs(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_tool(tmp_path, monkeypatch, "echo asking the driver; exec tail -f /dev/null")
    smi = NpuSmi(seconds=0.3)
    started = time.monotonic()
    with pytest.raises(IdentityError, match=r"no end within 0.3 s, printed:\nasking the driver") as raised:
        identity.chip_number(os.getpid(), 0, smi, own_pids=True)
    assert "pu-smi hangs: see whether" in str(raised.value)
    assert time.monotonic() - started < 20


def test_a_silent_npu_is_skipped_and_named(
    scenario: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """NPU 0 does not answer in time: the process is found on NPU 5 by its logic id. Without one, it may be on
    NPU 0 as well."""
    scenario("a2_substring_trap", 123)
    real = FAKE_NPU_SMI / "npu-smi"
    make_tool(tmp_path, monkeypatch, f'case "$*" in *"-i 0") exec tail -f /dev/null;; esac; exec {real} "$@"')
    assert identity.chip_number(os.getpid(), 5, NpuSmi(seconds=2), own_pids=True) == 5
    with pytest.raises(IdentityError, match=r"missing, unclear.*") as raised:
        identity.chip_number(os.getpid(), None, NpuSmi(seconds=2), own_pids=True)
    assert "`npu-smi info -t proc-mem -i 0`, no end within 2 s" in str(raised.value)


def test_what_libraries_say_does_not_stand_in_an_answer(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """stdout is buffered and stderr is not: in one pipe the one would come in the middle of the other."""
    scenario("a2_substring_trap", 123)
    real = FAKE_NPU_SMI / "npu-smi"
    make_tool(tmp_path, monkeypatch, f"printf '\\tChip ID : 9' >&2; exec {real} \"$@\"")
    assert device_uuid(None) == f"NPU-{IP}-5"


def test_a_table_that_cannot_be_read_is_not_replaced_by_the_list_of_cards(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The table may have physical ids, which differ from what the formula makes of the list."""
    scenario("a2_16npu_list_only", 9015)
    real = FAKE_NPU_SMI / "npu-smi"
    assert device_uuid(None) == f"NPU-{IP}-15"
    make_tool(tmp_path, monkeypatch, f'case "$*" in *-m) echo cut; exit 0;; esac; exec {real} "$@"')
    with pytest.raises(IdentityError, match="lists no NPU"):
        device_uuid(None)


@pytest.mark.parametrize(
    ("namespace", "capabilities", "own"),
    [
        ("pid:[4026531836]", "000001ffffffffff", True),
        ("pid:[4026532201]", "00000000a80425fb", True),  # docker's default
        ("pid:[4026532201]", "000001ffffffffff", False),
    ],
)
def test_whose_pids_the_driver_shows(tmp_path: Path, namespace: str, capabilities: str, own: bool) -> None:
    (tmp_path / "status").write_text(f"Name:\tpython\nCapPrm:\t000001ffffffffff\nCapEff:\t{capabilities}\n")
    (tmp_path / "ns").mkdir()
    (tmp_path / "ns" / "pid").symlink_to(namespace)
    assert identity.sees_own_pids(tmp_path) is own


def test_this_process_status_can_be_read() -> None:
    assert identity.sees_own_pids() in (True, False)


def test_it_is_asked_once(
    scenario: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scenario("a2_container_npu5", 812)
    log = tmp_path / "calls"
    make_tool(tmp_path, monkeypatch, f'echo "$*" >> {log}; exec {FAKE_NPU_SMI / "npu-smi"} "$@"')
    assert {device_uuid(0) for _ in range(3)} == {f"NPU-{IP}-5"}
    assert log.read_text().splitlines() == ["info -m", "info -t proc-mem -i 5"]


def test_the_address_of_a_host_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(identity.host_ip().split(".")) == 4

    def no_name(name: str) -> str:
        raise OSError("no such name")

    def no_route(*arguments: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(identity.socket.socket, "connect", no_route)
    monkeypatch.setattr(identity.socket, "gethostbyname", no_name)
    with pytest.raises(IdentityError, match="CKPT_ENGINE_HOST_ID"):
        identity.host_ip()
