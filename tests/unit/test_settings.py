"""Settings: each variable is read, in its unit, and a bad value is refused by the variable's name."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from pydantic import SecretStr

from ckpt_engine.errors import ConfigError
from ckpt_engine.settings import GiB, MiB, Settings, load_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of our variables is set, whatever the tests themselves run under."""
    for name in list(os.environ):
        if name in FIELDS or name.startswith(("PS_", "CKPT_ENGINE_")):
            monkeypatch.delenv(name)


# variable -> field, a good value, what it is read as
FIELDS: dict[str, tuple[str, str, object]] = {
    "RANK": ("rank", "3", 3),
    "WORLD_SIZE": ("world_size", "8", 8),
    "LOCAL_WORLD_SIZE": ("local_world_size", "4", 4),
    "MASTER_ADDR": ("master_addr", "10.0.0.1", "10.0.0.1"),
    "MASTER_PORT": ("master_port", "29500", 29500),
    "PS_MEM_FRACTION": ("mem_fraction", "0.5", 0.5),
    "PS_MAX_BUCKET_SIZE_GB": ("max_bucket_size_gb", "0.25", 0.25),
    "PS_P2P_STORE_RDMA_DEVICES": ("rdma_devices", "mlx5_0,mlx5_1", "mlx5_0,mlx5_1"),
    "NCCL_IB_HCA": ("nccl_ib_hca", "^=mlx5_2", "^=mlx5_2"),
    "PS_HOST_IP": ("host_ip", "10.0.0.9", "10.0.0.9"),
    "CKPT_ENGINE_P2P": ("p2p", "off", "off"),
    "CKPT_ENGINE_P2P_TRANSPORT": ("p2p_transport", "tcp", "tcp"),
    "CKPT_ENGINE_LEASE_PORT": ("lease_port", "18000", 18000),
    "CKPT_ENGINE_CONTROL_PORT": ("control_port", "18100", 18100),
    "CKPT_ENGINE_P2P_READERS": ("p2p_readers", "2", 2),
    "CKPT_ENGINE_LEASE_TIMEOUT": ("lease_timeout", "2.5", 2.5),
    "CKPT_ENGINE_LOG_FORMAT": ("log_format", "json", "json"),
    "CKPT_ENGINE_SLOT_MIB": ("slot_mib", "1.5", 1.5),
    "CKPT_ENGINE_SLOT_COUNT": ("slot_count", "5", 5),
    "CKPT_ENGINE_HOST_ID": ("host_id_override", "node-7", "node-7"),
    "CKPT_ENGINE_DEVICE_UUID": ("device_uuid", "GPU-1", "GPU-1"),
    "CKPT_ENGINE_CPU_DEVICES": ("cpu_devices", "2,3", "2,3"),
    "CKPT_ENGINE_SOCKET_DIR": ("socket_dir", "/run/ce", Path("/run/ce")),
    "CKPT_ENGINE_TRACE_DIR": ("trace_dir", "/var/traces", Path("/var/traces")),
    "CKPT_ENGINE_HANDSHAKE_TIMEOUT": ("handshake_timeout", "7.5", 7.5),
    "CKPT_ENGINE_REPLY_TIMEOUT": ("reply_timeout", "30", 30.0),
    "CKPT_ENGINE_STALL_TIMEOUT": ("stall_timeout", "4.5", 4.5),
    "CKPT_ENGINE_API_TOKEN": ("api_token", "open-sesame", SecretStr("open-sesame")),
    "CKPT_ENGINE_ALLOWED_ROOTS": ("allowed_roots", "/models:/dev/shm/w", "/models:/dev/shm/w"),
    "CKPT_ENGINE_ALLOWED_ENGINES": ("allowed_engines", "10.0.0.0/8,e:80", "10.0.0.0/8,e:80"),
    "CKPT_ENGINE_LOAD_THREADS": ("load_threads", "2", 2),
    "CKPT_ENGINE_HUGE_PAGES": ("huge_pages", "false", False),
    "CKPT_ENGINE_CUSTOM_DIST": ("custom_dist", "vllm_nccl", "vllm_nccl"),
    "CKPT_ENGINE_RELEASE_GROUPS": ("release_groups", "1", True),
    "CKPT_ENGINE_VERIFY": ("verify", "full", "full"),
    "CKPT_ENGINE_GUARD": ("guard", "true", True),
    "CKPT_ENGINE_NUMA": ("numa", "false", False),
    "CKPT_ENGINE_INPLACE_PIN": ("inplace_pin", "true", True),
}


def test_no_field_is_left_out_here() -> None:
    assert {field for field, _, _ in FIELDS.values()} == Settings.model_fields.keys()


@pytest.mark.parametrize("variable", FIELDS)
def test_a_variable_is_read(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    field, text, value = FIELDS[variable]
    assert getattr(load_settings(), field) != value
    monkeypatch.setenv(variable, text)
    assert getattr(load_settings(), field) == value


def another(value: object) -> object:
    """A good value of the same field that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    others = {"vllm_nccl": "vllm_gloo", "off": "on", "tcp": "rdma", "full": "transport", "json": "text"}
    if value in others:
        return others[str(value)]
    return value * 0.75 if isinstance(value, float) else type(value)("another")  # type: ignore[call-arg]


@pytest.mark.parametrize("variable", FIELDS)
def test_an_argument_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    field, text, value = FIELDS[variable]
    monkeypatch.setenv(variable, text)
    assert getattr(Settings(**{field: another(value)}), field) == another(value) != value  # type: ignore[arg-type]


@pytest.mark.parametrize("variable", FIELDS)
def test_other_programs_variables_are_not_read(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    field, text, _ = FIELDS[variable]
    for name in {field.upper(), variable.lower()} - {variable, field}:
        monkeypatch.setenv(name, text)  # SLOT_COUNT, DEVICE_UUID, ps_mem_fraction, ...
    assert getattr(load_settings(), field) == Settings.model_fields[field].default


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("RANK", "first", "valid integer"),
        ("RANK", "", "valid integer"),
        ("RANK", "1.5", "valid integer"),
        ("RANK", "-1", "greater than or equal to 0"),
        ("WORLD_SIZE", "0", "greater than or equal to 1"),
        ("LOCAL_WORLD_SIZE", "0", "greater than or equal to 1"),
        ("MASTER_ADDR", "", "unset it for the default"),
        ("MASTER_PORT", "0", "greater than or equal to 1"),
        ("MASTER_PORT", "65535", "less than or equal to 65534"),  # the control store takes the next one
        ("PS_MEM_FRACTION", "0", "greater than 0"),
        ("PS_MEM_FRACTION", "1.01", "less than or equal to 1"),
        ("PS_MEM_FRACTION", "90%", "valid number"),
        ("PS_MAX_BUCKET_SIZE_GB", "0", "greater than 0"),
        ("PS_MAX_BUCKET_SIZE_GB", "inf", "finite number"),
        ("CKPT_ENGINE_SLOT_MIB", "0", "greater than 0"),
        ("CKPT_ENGINE_SLOT_MIB", "-1", "greater than 0"),
        ("CKPT_ENGINE_SLOT_MIB", "256MiB", "valid number"),
        ("CKPT_ENGINE_SLOT_MIB", "inf", "finite number"),
        ("CKPT_ENGINE_SLOT_MIB", "nan", "finite number"),
        ("CKPT_ENGINE_SLOT_COUNT", "0", "greater than or equal to 1"),
        ("CKPT_ENGINE_SLOT_COUNT", "129", "less than or equal to 128"),
        ("CKPT_ENGINE_SLOT_COUNT", "three", "valid integer"),
        ("CKPT_ENGINE_SOCKET_DIR", "", "unset it for the default"),
        ("CKPT_ENGINE_TRACE_DIR", "", "unset it for the default"),
        ("CKPT_ENGINE_HANDSHAKE_TIMEOUT", "0", "greater than 0"),
        ("CKPT_ENGINE_HANDSHAKE_TIMEOUT", "inf", "finite number"),
        ("CKPT_ENGINE_REPLY_TIMEOUT", "2m", "valid number"),
        ("CKPT_ENGINE_REPLY_TIMEOUT", "-0.0", "greater than 0"),
        ("CKPT_ENGINE_STALL_TIMEOUT", "2", "greater than 2"),
        ("CKPT_ENGINE_LOAD_THREADS", "0", "greater than or equal to 1"),
        ("CKPT_ENGINE_HUGE_PAGES", "maybe", "valid boolean"),
        ("CKPT_ENGINE_INPLACE_PIN", "2", "valid boolean"),
        (
            "CKPT_ENGINE_CUSTOM_DIST",
            "nccl",
            "Input should be 'auto', 'vllm_nccl', 'vllm_gloo' or 'vllm_hccl'",
        ),
    ],
)
def test_a_bad_value_is_refused_by_the_variables_name_with_what_it_may_be(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, rule: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=re.escape(f"{variable}={text!r}: ") + f".*{rule}"):
        load_settings()


def test_every_bad_value_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_SLOT_COUNT", "0")
    monkeypatch.setenv("PS_MEM_FRACTION", "2")
    with pytest.raises(ConfigError, match=r"PS_MEM_FRACTION='2'.*CKPT_ENGINE_SLOT_COUNT='0'"):
        load_settings()


def test_the_api_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_API_TOKEN", "open-sesame")
    settings = load_settings()
    assert "sesame" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    monkeypatch.setenv("CKPT_ENGINE_SLOT_COUNT", "0")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "nbytes"),
    [
        ({}, 256 * MiB),
        ({"CKPT_ENGINE_SLOT_MIB": "0.5"}, MiB // 2),
        ({"CKPT_ENGINE_SLOT_MIB": "4096"}, 4 * GiB),
        ({"PS_MAX_BUCKET_SIZE_GB": "8"}, 256 * MiB),
        ({"PS_MAX_BUCKET_SIZE_GB": "0.125"}, 128 * MiB),
        ({"CKPT_ENGINE_SLOT_MIB": "4096", "PS_MAX_BUCKET_SIZE_GB": "1"}, GiB),
    ],
)
def test_a_slot_is_in_mib_and_its_cap_in_gib(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], nbytes: int
) -> None:
    for variable, text in environment.items():
        monkeypatch.setenv(variable, text)
    assert load_settings().slot_nbytes("cuda") == nbytes


def test_the_host_id_is_the_host_name_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().host_id == socket.gethostname()
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", "rack-1")
    assert load_settings().host_id == "rack-1"


@pytest.mark.parametrize(
    ("text", "expected"), [(None, [0, 1, 2]), ("4,0,7", [4, 0, 7]), (" 5 ,6,1", [5, 6, 1])]
)
def test_cpu_devices_map_an_engines_numbering_to_the_hosts(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: list[int]
) -> None:
    if text is not None:
        monkeypatch.setenv("CKPT_ENGINE_CPU_DEVICES", text)
    settings = load_settings()
    assert [settings.local_cpu_index(index) for index in range(3)] == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "1,1", "-1,2", "0-3", "1;2"])
def test_bad_cpu_devices_are_refused_with_an_example(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CKPT_ENGINE_CPU_DEVICES", text)
    with pytest.raises(ConfigError, match=f"CKPT_ENGINE_CPU_DEVICES='{text}': give .* such as '2,3'"):
        load_settings().local_cpu_index(0)


@pytest.mark.parametrize("index", [2, -1])
def test_a_device_that_is_not_listed_is_refused(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setenv("CKPT_ENGINE_CPU_DEVICES", "2,3")
    with pytest.raises(ConfigError, match=f"'2,3' lists 2 devices, but this process asks for number {index}"):
        load_settings().local_cpu_index(index)
