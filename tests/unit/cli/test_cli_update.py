from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from engine_for_cli_tests import Engine

from ckpt_engine import ParameterServer
from ckpt_engine.cli import files
from ckpt_engine.cli import push as push_module
from ckpt_engine.cli.push import InferenceGroup, Split, inference_group, share_of
from ckpt_engine.errors import ConfigError
from ckpt_engine.metadata import HostBufferMeta, RankMetas, TensorMeta, metas_from_json, metas_to_json
from ckpt_engine.server.engine_client import request_timeout, worker_time_limit
from tests.support.mooncake import need_mooncake
from tests.support.npy_files import NpyFile

Cli = Callable[..., Any]


def test_an_engine_gets_the_checkpoint(cli: Cli, checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    metas_file, report_file = tmp_path / "metas.json", tmp_path / "report.json"
    done = cli(
        *("update", "--checkpoint-path", checkpoint, "--checkpoint-name", "step-1"),
        *("--update-method", "broadcast", "--endpoint", engine.url + "/", "--sleep-time", 0.1),
        *("--save-metas-file", metas_file, "--report-file", report_file, "--timeout", 60),
    )
    assert done.exit_code == 0, done.output
    assert torch.equal(engine.weights["a.weight"], torch.arange(2048, dtype=torch.float32))
    assert sorted(engine.weights) == ["a.bias", "a.weight", "b.weight", "b[red]"]
    assert engine.requests[0]["path"] == "/collective_rpc"
    assert engine.requests[0]["timeout"] < 60

    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["register", "health", "gather", "update"]
    assert lines[4].startswith("step-1 is in place as version ")
    assert lines[5] == "staying for 0.1 s"
    assert not done.stderr

    assert metas_from_json(metas_file.read_text())[0].tensor_count == 4
    report = json.loads(report_file.read_text())
    assert (report["tensors"], report["bytes"], report["world_size"]) == (4, 10496, 1)
    assert report["checkpoint"] == "step-1"
    assert report["version"]
    assert report["update_seconds"] > 0
    assert list(report["stages"]) == ["register", "health", "gather", "update"]
    assert "buckets" in report["update_stages"]


@pytest.mark.parametrize(
    "options",
    [
        *(("--pause", "keep"), ("--partial",), ("--native",), ("--ignored", "vision.*")),
        ("--engine", "vllm", "--pause", "twice"),
    ],
)
def test_options_that_do_not_fit_the_engine(cli: Cli, checkpoint: Path, options: tuple[str, ...]) -> None:
    done = cli("update", "--checkpoint-path", checkpoint, *options)
    assert done.exit_code == 2
    assert "--engine vllm" in done.output or "none, keep, wait and abort" in done.output


def test_what_vllm_may_be_sent_less_or_more_than(cli: Cli, checkpoint: Path, engine: Engine) -> None:
    args = ("update", "--checkpoint-path", checkpoint, "--endpoint", engine.url, "--engine", "vllm")
    done = cli(*args, "--partial", "--ignored", "vision.*", "--ignored", "lm_head.weight")
    assert done.exit_code == 0, done.output
    asked = next(request for request in engine.requests if request["path"] == "/collective_rpc")
    assert asked["method"] == "update_weights_from_ipc"
    options = asked["kwargs"]
    assert (options["partial"], options["ignored"]) == (True, ["vision.*", "lm_head.weight"])
    engine.requests.clear()
    assert cli(*args).exit_code == 0
    assert {"partial", "ignored"}.isdisjoint(engine.requests[0].get("kwargs", {}))


@pytest.mark.parametrize("by", ["option", "environment"])
def test_vllms_key_goes_with_each_request(
    cli: Cli, checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    args = ["update", "--checkpoint-path", checkpoint, "--endpoint", engine.url, "--engine", "vllm"]
    if by == "option":
        args += ["--api-key", "secret"]
    else:
        monkeypatch.setenv("VLLM_API_KEY", "secret")
    done = cli(*args, "--pause", "keep")
    assert done.exit_code == 0, done.output
    asked = {request["path"].split("?")[0]: request["authorization"] for request in engine.requests}
    paths = ("/pause", "/collective_rpc", "/reset_prefix_cache", "/resume")
    assert asked == dict.fromkeys(paths, "Bearer secret")


def test_a_worker_s_failure(cli: Cli, checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    engine.fail = True
    args = ("update", "--checkpoint-path", checkpoint, "--endpoint", engine.url)
    done = cli(*args, "--report-file", tmp_path / "report.json")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: rank 0 (host here, device CPU-here-0), stage ")
    assert "the engine cannot take it" in done.stderr
    assert "traceback where it happened" not in done.stderr
    assert not (tmp_path / "report.json").exists()
    assert "traceback where it happened" in cli(*args, "--verbose").stderr


def test_an_engine_that_is_not_there(cli: Cli, checkpoint: Path) -> None:
    done = cli(
        *("update", "--checkpoint-path", checkpoint, "--endpoint", "http://127.0.0.1:1"),
        *("--health-timeout", 0.2),
    )
    assert done.exit_code == 1
    assert "http://127.0.0.1:1/health" in done.stderr
    assert done.stdout.startswith("register ")


def test_a_missing_checkpoint(cli: Cli, tmp_path: Path) -> None:
    done = cli("update", "--checkpoint-path", tmp_path / "none")
    assert (done.exit_code, done.stderr) == (1, f"error: {tmp_path / 'none'} does not exist\n")


def test_a_lying_file(cli: Cli, lying_file: Path) -> None:
    done = cli("update", "--checkpoint-path", lying_file)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {lying_file}: tensor 'w': ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--inference-parallel-size", 2), "--inference-parallel-size: 2 does not divide the world size, 1"),
        (("--endpoint", "http://a", "--endpoint", "http://b"), "2 endpoints for 1 inference groups"),
        (("--join", "http://a"), "give a checkpoint, or fleets to join"),
        (("--update-method", "other"), "--update-method"),
        (("--split", "layer"), "--split"),
        (("--timeout", "0"), "--timeout"),
        (("--health-timeout", "inf"), "--health-timeout"),
        (("--sleep-time", "-1"), "--sleep-time"),
        (("--report-file", "/nowhere/report.json"), "--report-file"),
    ],
)
def test_bad_usage(cli: Cli, checkpoint: Path, options: tuple[object, ...], named: str) -> None:
    done = cli("update", "--checkpoint-path", checkpoint, *options)
    assert done.exit_code == 2
    # typer quotes the option's name
    assert named in done.stderr.replace("'", "")


def test_metas_to_join_are_checked_first(cli: Cli, tmp_path: Path) -> None:
    metas = tmp_path / "metas.json"

    def refused(text: bytes | None) -> str:
        if text is not None:
            metas.write_bytes(text)
        done = cli("update", "--load-metas-file", metas)
        assert done.exit_code == 1, done.output
        return str(done.stderr)

    assert refused(None) == f"error: --load-metas-file {metas}: No such file or directory\n"
    assert "--load-metas-file" in refused(b"{")
    assert "not a metas document" in refused(b'{"0": {}}')
    assert refused(b"{}") == f"error: --load-metas-file {metas}: its ranks hold no tensor\n"
    tensor = TensorMeta(name="w", dtype="float32", shape=(3,), offset=0, nbytes=12)
    buffer = HostBufferMeta(address=4096, nbytes=256, tensors=(tensor,))
    held = RankMetas(rank=0, host="h", host_ip="::1", device_uuid="d", epoch="e", buffers=(buffer,))
    assert f"{metas}: metas of one checkpoint are needed" in refused(metas_to_json({0: held}))
    held = held.model_copy(update={"checkpoint": "c"})
    assert "'w' first) cannot be read by P2P: rank 0 on host h" in refused(metas_to_json({0: held}))


class Owner:
    """Another fleet, of one rank. `url`: gives its metas, as `ckpt-engine serve` does."""

    def __init__(self, checkpoint: Path) -> None:
        self.ps = ParameterServer(rank=0, world_size=1, device="cpu")
        self.ps.register_checkpoint("step-7", files=sorted(checkpoint.glob("*.safetensors")))
        self.ps.gather_metas("step-7")
        self.metas = metas_to_json(self.ps.get_metas())
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path == "/v1/metas" and self.headers["Authorization"] == "Bearer sesame"
                self.send_response(200 if found else 401)
                self.end_headers()
                self.wfile.write(owner.metas if found else b"no token")

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.ps.close()


@pytest.fixture
def owner(checkpoint: Path) -> Iterator[Owner]:
    need_mooncake()
    made = Owner(checkpoint)
    yield made
    made.close()


@pytest.mark.parametrize("by", ["--load-metas-file", "--join"])
def test_a_new_engine_joins_another_fleet(
    cli: Cli, owner: Owner, engine: Engine, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas, report_file = tmp_path / "metas.json", tmp_path / "report.json"
    metas.write_bytes(owner.metas)
    monkeypatch.setenv("CKPT_ENGINE_API_TOKEN", "sesame")
    where = metas if by == "--load-metas-file" else owner.url
    keep = ("--keep",) if by == "--join" else ()
    done = cli("update", by, where, "--endpoint", engine.url, "--report-file", report_file, *keep)
    assert done.exit_code == 0, done.output
    assert sorted(engine.weights) == ["a.bias", "a.weight", "b.weight", "b[red]"]
    assert torch.equal(engine.weights["a.weight"], torch.arange(2048, dtype=torch.float32))
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["load", "health", "update"]
    assert "step-7 is in place" in done.stdout
    assert "read by P2P (tcp)" in done.stdout
    report = json.loads(report_file.read_text())
    assert (report["update_method"], report["p2p_transport"], report["p2p_bytes"]) == ("join", "tcp", 10496)
    assert report["kept_bytes"] == (10496 if keep else 0)
    assert "CKPT_ENGINE_P2P" not in os.environ


def test_a_fleet_that_cannot_be_asked(cli: Cli, owner: Owner, engine: Engine) -> None:
    done = cli("update", "--join", owner.url, "--endpoint", engine.url)
    assert (done.exit_code, done.stderr) == (1, f"error: --join {owner.url}: HTTP 401: b'no token'\n")
    done = cli("update", "--join", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: --join http://127.0.0.1:1: ConnectError")
    done = cli("update", "--join", "unix:/nowhere.sock")
    assert done.stderr.startswith("error: --join unix:/nowhere.sock: ")


@pytest.mark.parametrize("method", ["p2p", "all"])
def test_the_first_group_reads_from_the_others(
    checkpoint: Path, engine: Engine, tmp_path: Path, method: str
) -> None:
    need_mooncake()
    other = Engine("CPU-here-1")
    report_file = tmp_path / "report.json"
    try:
        arguments = ("--update-method", method, "--report-file", str(report_file))
        ranks = _start_ranks(checkpoint, "--endpoint", engine.url, "--endpoint", other.url, *arguments)
        (out, err), (_, other_err) = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        other.close()
    assert [rank.returncode for rank in ranks] == [0, 0], err + other_err
    assert len(engine.weights) == 4
    assert len(other.weights) == (4 if method == "all" else 0)
    assert "read by P2P (tcp)" in out
    assert json.loads(report_file.read_text())["p2p_bytes"] > 0


def test_only_who_joins_can_keep(cli: Cli, checkpoint: Path) -> None:
    done = cli("update", "--checkpoint-path", checkpoint, "--keep")
    assert (done.exit_code, "there is no fleet to join" in done.stderr) == (2, True)


def test_a_checkpoint_must_be_named(cli: Cli) -> None:
    done = cli("update")
    assert (done.exit_code, "--checkpoint-path" in done.stderr) == (2, True)


def test_splits(checkpoint: Path) -> None:
    def names(split: Split | None) -> list[set[str]]:
        shares = [share_of(checkpoint, split, rank, 2) for rank in range(2)]
        return [{str(file.names or file.path.name) for file in share} for share in shares]

    by_file = [{"one.safetensors"}, {"two.safetensors"}]
    assert names(None) == names(Split.FILE) == by_file
    with pytest.raises(ConfigError, match=r"--split tensor: .* has no model.safetensors.index.json"):
        names(Split.TENSOR)
    with pytest.raises(ConfigError, match="is one file"):
        share_of(checkpoint / "one.safetensors", Split.TENSOR, 0, 1)
    weights = {"a.weight": "one", "a.bias": "one", "b.weight": "two", "b[red]": "two"}
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in weights.items()}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(Split.FILE) == by_file
    assert names(None) == names(Split.TENSOR)
    # a.weight is larger than all others together.
    shares = [share_of(checkpoint, Split.TENSOR, rank, 2) for rank in range(2)]
    assert [sorted(name for file in share for name in file.names or ()) for share in shares] == [
        ["a.weight"],
        ["a.bias", "b.weight", "b[red]"],
    ]


def test_by_file_through_the_engine(cli: Cli, checkpoint: Path, engine: Engine) -> None:
    args = ("update", "--checkpoint-path", checkpoint, "--endpoint", engine.url)
    done = cli(*args, "--split", "file", "--custom-dist")
    assert done.exit_code == 0, done.output
    assert len(engine.weights) == 4


def test_shards_through_the_engine(cli: Cli, engine: Engine, tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    for tp, shard in enumerate(whole.chunk(2, 1)):
        NpyFile([("w", shard, 1)]).write(tmp_path / f"model.0.{tp}.npy", tp_size=2)
    done = cli("update", "--checkpoint-path", tmp_path, "--endpoint", engine.url)
    assert done.exit_code == 0, done.output
    assert torch.equal(engine.weights["w"], whole)


def test_groups_that_cannot_be_had(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_CUSTOM_DIST", "auto")  # restored afterwards: the command sets it
    args = ("update", "--checkpoint-path", checkpoint)
    done = cli(*args, "--custom-dist", "vllm_nccl")
    assert done.exit_code == 1
    assert "custom_dist=vllm_nccl: needs CUDA devices" in done.output
    done = cli(*args, "--custom-dist", "mpi")
    assert done.exit_code == 1
    assert "CKPT_ENGINE_CUSTOM_DIST='mpi'" in done.output
    assert "vllm_gloo" in done.output


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "metas.json", tmp_path / "link.json"
    link.symlink_to(path)
    files.write(link, b"one")
    assert link.is_symlink()
    assert path.read_bytes() == b"one"
    mask = os.umask(0o027)
    try:
        files.write(path, b"two")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"metas\.json cannot be written: No space left"):
        files.write(path, b"three")
    assert path.read_bytes() == b"two"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.json", "metas.json"]
    files.write(Path("/dev/null"), b"nowhere")
    assert not Path("/dev/null").is_file()


COMMAND = ("ckpt_engine.cli.main", "update")


def _start_ranks(
    checkpoint: Path, *args: str, command: Sequence[str] = COMMAND, size: int = 2
) -> list[subprocess.Popen[str]]:
    """So many ranks, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store_port = probe.getsockname()[1]  # the ranks use MASTER_PORT + 1
    launched = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", *command, "--checkpoint-path", checkpoint),
                *("--inference-parallel-size", "1", "--timeout", "60", *args),
            ],
            env=os.environ | launched | {"RANK": str(rank), "MASTER_PORT": str(store_port - 1)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def test_two_ranks_with_an_engine_each(checkpoint: Path, engine: Engine) -> None:
    other = Engine("CPU-here-1")
    try:
        ranks = _start_ranks(checkpoint, "--endpoint", engine.url, "--endpoint", other.url)
        (out, err), (other_out, other_err) = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        other.close()
    assert [rank.returncode for rank in ranks] == [0, 0], err + other_err
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["register", "health", "gather", "update"]
    assert not other_out
    for each, uuid in ((engine, "CPU-here-0"), (other, "CPU-here-1")):
        assert len(each.weights) == 4
        # Its own group's handles, and no others.
        assert [[device for device, _ in request["args"][0]] for request in each.requests] == [[uuid]]


SGLANG = ("ckpt_engine_sglang.sglang_update",)


@pytest.mark.parametrize(
    ("command", "options", "route"),
    [
        (COMMAND, (), "/collective_rpc"),
        (COMMAND, ("--engine", "vllm"), "/collective_rpc"),
        (SGLANG, (), "/update_weights_from_ipc"),
    ],
    ids=["embedded", "vllm", "sglang"],
)
def test_each_engine_is_asked_once_for_all_its_ranks(
    checkpoint: Path, command: Sequence[str], options: Sequence[str], route: str
) -> None:
    """Two engines of two workers each, of four ranks: one HTTP request that moves weights to each of them,
    which names its own workers' handles and no others."""
    engines = [Engine(*(f"CPU-here-{2 * group + index}" for index in range(2))) for group in range(2)]
    ends = [argument for engine in engines for argument in ("--endpoint", engine.url)]
    sizes = ("--inference-parallel-size", "2")
    ranks: list[subprocess.Popen[str]] = []
    try:
        ranks = _start_ranks(checkpoint, *sizes, *ends, *options, command=command, size=4)
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        for engine in engines:
            engine.close()
    assert [rank.returncode for rank in ranks] == [0] * 4, errors
    for engine in engines:
        (request,) = [request for request in engine.requests if request["path"] == route]
        handles = dict(request["args"][0] if "args" in request else request["zmq_handles"])
        assert sorted(handles) == list(engine.device_uuids)
        assert len(set(handles.values())) == 2
        # What else was asked, was so once for the engine, too.
        paths = [request["path"] for request in engine.requests]
        assert len(set(paths)) == len(paths), paths
        assert len(engine.weights) == 4


def test_a_failure_on_one_rank_fails_both(checkpoint: Path, engine: Engine) -> None:
    other = Engine("CPU-here-1")
    other.fail = True
    try:
        ranks = _start_ranks(checkpoint, "--endpoint", engine.url, "--endpoint", other.url)
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        other.close()
    assert [rank.returncode for rank in ranks] == [1, 1]
    for rank, text in enumerate(errors):
        assert text.startswith(f"[rank {rank}] error: rank 1 (host here, device CPU-here-1)"), text
        assert "the engine cannot take it" in text


def test_groups() -> None:
    defaults: dict[str, Any] = {"size": 2, "endpoints": ["http://e/"], "uds": None}

    def group_of(rank: int, **options: object) -> InferenceGroup:
        return inference_group(rank, 4, **(defaults | options))

    assert group_of(3) == InferenceGroup(first=2, size=2, endpoint="http://e", uds=None, count=2)
    assert group_of(3, size=None) == InferenceGroup(first=0, size=4, endpoint="http://e", uds=None)
    assert [group_of(rank, endpoints=["a", "b"]).endpoint for rank in range(4)] == ["a", "a", "b", "b"]
    assert group_of(2, uds="/run/{group}.sock").uds == "/run/1.sock"
    assert group_of(2).part([(str(rank), "") for rank in range(4)]) == [("2", ""), ("3", "")]


@pytest.mark.parametrize("options", [{"size": 3}, {"size": 8}, {"endpoints": ["a", "b", "c"]}])
def test_groups_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(typer.BadParameter):
        inference_group(0, 4, **({"size": 2, "endpoints": ["a"], "uds": None} | options))


@pytest.mark.parametrize("timeout", [5.0, 60.0, 600.0, 7200.0])
def test_the_http_request_ends_before_the_update(timeout: float) -> None:
    asked = request_timeout(timeout)
    assert asked > 0
    slack = min(10.0, max(1.0, 0.05 * asked))  # of request_inference_to_update
    assert asked + slack < timeout
    assert 0 < worker_time_limit(asked) < asked


def test_plain_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(push_module.time, "monotonic", lambda: now)
    tell = push_module._plain_progress("update")
    tell(1024, 4096)
    now = 106.0
    tell(2048, 4096)
    tell(3072, 4096)
    assert capsys.readouterr().err == "update: 2.00 KiB of 4.00 KiB\n"


def test_a_version_of_the_caller_s_and_digests(
    cli: Cli, checkpoint: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_VERIFY", "off")
    report, metas = tmp_path / "report.json", tmp_path / "metas.json"
    done = cli(
        *("update", "--checkpoint-path", checkpoint, "--endpoint", engine.url, "--weight-version", "step 7"),
        *("--verify", "transport", "--report-file", report, "--save-metas-file", metas),
    )
    assert done.exit_code == 0, done.output
    assert json.loads(report.read_text())["version"] == "step 7"
    assert "is in place as version step 7" in done.stdout
    held = metas_from_json(metas.read_text())[0]
    assert all(tensor.digest for buffer in held.buffers for tensor in buffer.tensors)
    done = cli("update", "--checkpoint-path", checkpoint, "--endpoint", engine.url, "--verify", "full")
    assert done.exit_code == 1
    assert "cannot compare what was loaded" in done.output
