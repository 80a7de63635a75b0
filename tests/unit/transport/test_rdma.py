"""Which RDMA devices a rank uses: NCCL's grammar, equal shares, the nearest ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.errors import ConfigError
from ckpt_engine.settings import Settings
from ckpt_engine.transport import findings
from ckpt_engine.transport.findings import describe
from ckpt_engine.transport.rdma import (
    chosen_devices,
    devices_of_ranks,
    parse_nccl_ib_hca,
    pci_closeness,
    share_out,
)
from ckpt_engine.transport.verbs import RdmaDevice

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=500)

TEN = [f"mlx5_{number}" for number in range(11)]


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        (None, TEN),
        ("", TEN),
        ("  \t", TEN),
        ("mlx5", TEN),
        ("mlx5_1", ["mlx5_1"]),  # a whole name: not mlx5_10
        ("mlx5_10,mlx5_2", ["mlx5_2", "mlx5_10"]),
        ("=mlx5_1", ["mlx5_1"]),
        ("=mlx5", []),
        ("=mlx5_0,mlx5_3", ["mlx5_0", "mlx5_3"]),
        ("^mlx5_1", [name for name in TEN if name != "mlx5_1"]),
        ("^mlx5", []),
        ("^=mlx5", TEN),
        ("^=mlx5_0,mlx5_10", TEN[1:10]),
        ("mlx5_0:1,mlx5_3:2", ["mlx5_0", "mlx5_3"]),
        ("=mlx5_0:1:2", ["mlx5_0"]),
        ("^=mlx5_0:1", TEN[1:]),
        (" mlx5_0 , mlx5_1 ", ["mlx5_0", "mlx5_1"]),
        (",,mlx5_0,", ["mlx5_0"]),
        (":1,mlx5_0", ["mlx5_0"]),
        ("^", TEN),  # all but none
        ("=", []),  # just none
        ("^=", TEN),
        ("ib", []),
        ("^ib", TEN),
    ],
)
def test_grammar(value: str | None, chosen: list[str]) -> None:
    assert parse_nccl_ib_hca(value, TEN) == chosen


@pytest.mark.parametrize("value", ["=^mlx5_0", " =^"])
def test_the_wrong_order_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="write '\\^='"):
        parse_nccl_ib_hca(value, TEN)


def test_at_most_32_devices() -> None:
    many = [f"mlx5_{number}" for number in range(40)]
    assert parse_nccl_ib_hca("", many) == many[:32]
    assert parse_nccl_ib_hca("mlx5", many) == many[:32]
    assert parse_nccl_ib_hca("^=mlx5_0", many) == many[1:33]


def test_a_name_of_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_nccl_ib_hca("mlx5_0,ib7", TEN) == ["mlx5_0"]
    assert caplog.messages == ["NCCL_IB_HCA='mlx5_0,ib7': no RDMA device is called 'ib7' here"]


names = st.lists(st.text("ab_0", min_size=1, max_size=3), unique=True, max_size=40)
ports = st.sampled_from(["", ":1", ":1:x", ":"])
spaces = st.sampled_from(["", " ", "\t"])
tokens = st.lists(st.tuples(spaces, st.text("ab_0", max_size=3), ports, spaces).map("".join), max_size=4)


@reproducible
@given(st.sampled_from(["", "=", "^", "^="]), tokens, names)
def test_grammar_against_a_model(prefix: str, listed: list[str], available: list[str]) -> None:
    """The model asks of each device alone whether the list means it."""
    value = prefix + ",".join(listed)
    words = [word.split(":")[0].strip() for word in listed]

    def is_meant(device: str) -> bool:
        if not value.strip():
            return True
        hit = False
        for word in words:
            whole_name = word in available
            if device == word or (
                word and "=" not in prefix and not whole_name and device[: len(word)] == word
            ):
                hit = True
        return hit ^ ("^" in prefix)

    assert parse_nccl_ib_hca(value, available) == [name for name in available if is_meant(name)][:32]


def devices(*names: str, broken: str = "") -> list[RdmaDevice]:
    return [
        RdmaDevice(
            name=name, active_ports=(1,), problem="none of its 1 ports is active" if name == broken else ""
        )
        for name in names
    ]


def test_the_named_devices_are_used_in_their_order() -> None:
    given_names = Settings(rdma_devices="mlx5_3, mlx5_0,,mlx5_3", nccl_ib_hca="mlx5_1")
    assert chosen_devices(given_names, devices(*TEN)) == ["mlx5_3", "mlx5_0"]


def test_else_those_of_nccl_else_all_that_are_usable() -> None:
    found = devices(*TEN, broken="mlx5_1")
    assert chosen_devices(Settings(nccl_ib_hca="mlx5_1,mlx5_2"), found) == ["mlx5_2", "mlx5_10"]
    assert chosen_devices(Settings(), found) == [name for name in TEN if name != "mlx5_1"]
    assert chosen_devices(Settings(), []) == []


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (devices("mlx5_0", "mlx5_1", broken="mlx5_1"), "none of its 1 ports is active"),
        (devices("mlx5_0", "mlx5_2"), "libibverbs lists mlx5_0, mlx5_2"),
        ([], "libibverbs lists no usable device"),
    ],
)
def test_a_named_device_that_is_not_there_is_an_error(found: list[RdmaDevice], why: str) -> None:
    with pytest.raises(ConfigError, match=f"PS_P2P_STORE_RDMA_DEVICES names mlx5_[01], .*{why}"):
        chosen_devices(Settings(rdma_devices="mlx5_0,mlx5_1"), found)


@pytest.mark.parametrize(
    ("count", "gpus", "shares"),
    [
        (2, 2, ["mlx5_0", "mlx5_1"]),
        (1, 3, ["mlx5_0"] * 3),
        (2, 8, ["mlx5_0"] * 4 + ["mlx5_1"] * 4),
        (4, 2, ["mlx5_0,mlx5_1", "mlx5_2,mlx5_3"]),
        (3, 1, ["mlx5_0,mlx5_1,mlx5_2"]),
    ],
)
def test_equal_shares(count: int, gpus: int, shares: list[str]) -> None:
    assert share_out(TEN[:count], gpus) == shares


@pytest.mark.parametrize(("count", "gpus"), [(9, 8), (3, 8), (3, 2), (2, 3)])
def test_what_cannot_be_shared_equally_names_both_variables(count: int, gpus: int) -> None:
    with pytest.raises(ConfigError, match=r"PS_P2P_STORE_RDMA_DEVICES or NCCL_IB_HCA") as raised:
        share_out(TEN[:count], gpus)
    assert f"{count} RDMA devices" in str(raised.value)
    assert f"{gpus} GPUs" in str(raised.value)


class Sysfs:
    """A made-up tree: where each PCI device is, and which RDMA device belongs to which."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "class/infiniband").mkdir(parents=True)

    def pci(self, address: str, above: str, node: int) -> Path:
        """A device below `above`, such as "pci0000:15/0000:15:01.0"."""
        place = self.root / "devices" / above / address
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
        (self.root / "bus/pci/devices" / address).symlink_to(place)
        return place

    def rdma(self, name: str, address: str, above: str, node: int) -> None:
        place = self.pci(address, above, node)
        (self.root / "class/infiniband" / name).mkdir()
        (self.root / "class/infiniband" / name / "device").symlink_to(place)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


def test_a_gpu_gets_the_device_behind_its_own_switch(sysfs: Sysfs) -> None:
    """The kernel numbers the RDMA devices the other way round than CUDA the GPUs."""
    for number in range(4):
        switch = f"pci0000:{number}0/0000:{number}0:01.0/0000:{number}1:00.0"
        sysfs.pci(f"0000:{number}2:00.0", switch, node=number // 2)
        sysfs.rdma(f"mlx5_{3 - number}", f"0000:{number}3:00.0", switch, node=number // 2)
    addresses = [f"0000:{number}2:00.0" for number in range(4)]
    found = devices(*TEN[:4])
    assert devices_of_ranks(Settings(), 4, addresses, found=found, sysfs=sysfs.root) == [
        "mlx5_3",
        "mlx5_2",
        "mlx5_1",
        "mlx5_0",
    ]
    assert devices_of_ranks(Settings(), 4, found=found, sysfs=sysfs.root) == TEN[:4]  # by their order


def test_gpus_share_the_device_of_their_numa_node(sysfs: Sysfs) -> None:
    """GPUs 0, 2 on node 1 and 1, 3 on node 0; one device on each node, under roots of their own."""
    for number, node in enumerate((1, 0, 1, 0)):
        sysfs.pci(f"0000:{number}a:00.0", f"pci0000:{number}0", node)
    sysfs.rdma("mlx5_0", "0000:b0:00.0", "pci0000:b0", node=0)
    sysfs.rdma("mlx5_1", "0000:c0:00.0", "pci0000:c0", node=1)
    addresses = [f"0000:{number}A:00.0" for number in range(4)]  # CUDA may write capitals
    found = devices("mlx5_0", "mlx5_1")
    assert devices_of_ranks(Settings(), 4, addresses, found=found, sysfs=sysfs.root) == [
        "mlx5_1",
        "mlx5_0",
        "mlx5_1",
        "mlx5_0",
    ]


def test_several_devices_for_each_gpu_are_its_nearest(sysfs: Sysfs) -> None:
    sysfs.pci("0000:01:00.0", "pci0000:00", node=0)
    sysfs.pci("0000:11:00.0", "pci0000:10", node=1)
    for number, root in enumerate((10, 0, 10, 0)):
        sysfs.rdma(f"mlx5_{number}", f"0000:{root:02}:0{number}.0", f"pci0000:{root:02}", node=root // 10)
    found = devices(*TEN[:4])
    assert devices_of_ranks(
        Settings(), 2, ["0000:01:00.0", "0000:11:00.0"], found=found, sysfs=sysfs.root
    ) == ["mlx5_1,mlx5_3", "mlx5_0,mlx5_2"]


def test_an_unknown_place_of_one_means_the_order_of_all(sysfs: Sysfs) -> None:
    """A software device (rxe) has no place in the PCI tree; a GPU's address may be unknown to sysfs."""
    sysfs.pci("0000:01:00.0", "pci0000:00", node=0)
    sysfs.rdma("mlx5_0", "0000:02:00.0", "pci0000:00", node=0)
    (sysfs.root / "class/infiniband/rxe0").mkdir()
    one = ["0000:01:00.0"]
    assert pci_closeness(["mlx5_0"], one, 1, sysfs.root) is not None
    assert pci_closeness(["mlx5_0", "rxe0"], one, 1, sysfs.root) is None
    assert pci_closeness(["mlx5_0"], ["0000:99:00.0"], 1, sysfs.root) is None
    assert pci_closeness(["mlx5_0"], one, 2, sysfs.root) is None


@st.composite
def hierarchies(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Places of GPUs and of devices in a tree of depth 3, such that one number divides the other."""
    gpu_count, device_count = draw(st.sampled_from([(2, 2), (3, 3), (4, 4), (4, 2), (2, 4), (6, 2), (1, 3)]))
    place = st.tuples(*[st.integers(0, 2)] * 3)
    return (
        draw(st.lists(place, min_size=gpu_count, max_size=gpu_count)),
        draw(st.lists(place, min_size=device_count, max_size=device_count)),
    )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((step for step, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@reproducible
@given(hierarchies())
def test_no_other_equal_share_is_nearer(case: tuple[list[tuple[int, ...]], list[tuple[int, ...]]]) -> None:
    gpus, nics = case
    shares = share_out(
        TEN[: len(nics)], len(gpus), lambda gpu, name: common(gpus[gpu], nics[TEN.index(name)])
    )
    taken = [[TEN.index(name) for name in share.split(",")] for share in shares]
    each = max(1, len(nics) // len(gpus))
    assert all(len(share) == each for share in taken)
    used = [sum(number in share for share in taken) for number in range(len(nics))]
    assert used == [max(1, len(gpus) // len(nics))] * len(nics)

    got = sum(common(gpus[gpu], nics[number]) for gpu, share in enumerate(taken) for number in share)
    # By brute force: every order of the devices' places, dealt out one after the other.
    places = [nic for nic in nics for _ in range(used[0])]
    holders = [gpu for gpu in gpus for _ in range(each)]
    best = max(
        sum(common(gpu, nic) for gpu, nic in zip(holders, order, strict=True))
        for order in itertools.permutations(places)
    )
    assert got == best


def test_doctor_says_which_rank_gets_which() -> None:
    found = devices("mlx5_0", "mlx5_1", "mlx5_2", broken="mlx5_1")
    said = list(describe(Settings(local_world_size=4), found, "cpu"))
    assert [(finding.subject, finding.level.value, finding.message) for finding in said] == [
        ("rdma mlx5_0", "ok", "port 1 active"),
        ("rdma mlx5_1", "warning", "none of its 1 ports is active"),
        ("rdma mlx5_2", "ok", "port 1 active"),
        ("rdma rank 0", "ok", "mlx5_0"),
        ("rdma rank 1", "ok", "mlx5_0"),
        ("rdma rank 2", "ok", "mlx5_2"),
        ("rdma rank 3", "ok", "mlx5_2"),
    ]


def test_doctor_reports_what_cannot_be_shared_out() -> None:
    said = list(describe(Settings(local_world_size=2), devices("mlx5_0", "mlx5_1", "mlx5_2"), "cpu"))
    assert said[-1].level.value == "warning"
    assert "NCCL_IB_HCA" in said[-1].message


def test_doctor_without_devices() -> None:
    (said,) = describe(Settings(local_world_size=1), [], "cpu")
    assert said.message == "no RDMA device: its P2P would go over TCP"


def test_doctor_tells_no_npu_of_rdma_devices_or_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three devices cannot be shared out among eight, and need not be."""
    monkeypatch.setattr(findings, "list_devices", lambda: devices("mlx5_0", "mlx5_1", "mlx5_2"))
    monkeypatch.setattr(findings, "load_library", lambda: None)
    monkeypatch.setattr(findings, "detect_device", lambda name: "cpu")
    said = list(findings.find(Settings(local_world_size=8), {}))
    assert "would go over TCP" in said[0].message
    assert said[-1].level.value == "warning"
    monkeypatch.setattr(findings, "detect_device", lambda name: "npu")
    (said_of_npus,) = findings.find(Settings(local_world_size=8), {})
    assert said_of_npus.level.value == "ok"
    assert "ascend_direct" in said_of_npus.message


def test_doctor_says_why_npus_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def detect(name: str | None) -> str:
        raise ConfigError("torch_npu cannot be imported")

    monkeypatch.setattr(findings, "detect_device", detect)
    (said,) = findings.find(Settings(), {})
    assert (said.level.value, said.message) == ("warning", "torch_npu cannot be imported")
