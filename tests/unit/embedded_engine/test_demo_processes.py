"""The demo's promises: nothing is left behind, and the last line says whether it worked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckpt_engine.cli import demo
from ckpt_engine.embedded_engine.processes import Children, Interrupted, Signals

ROOT = Path(__file__).parents[3]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def short_path() -> Iterator[Path]:
    """pytest's own may be too long for the path of a socket."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text()


def test_descendants_in_sessions_of_their_own_end_too(tmp_path: Path) -> None:
    children = Children(tmp_path, Signals())
    # As under torchrun: a grandchild in another session, deaf to SIGTERM, whose parent just dies.
    grandchild = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, '-c', {grandchild!r}]\n"
        "child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    child = children.start("parent", ["-c", parent])
    pid = int(wait_for(tmp_path / "parent.out.log"))
    assert alive(pid)
    children.end()
    assert child.process.returncode == -signal.SIGTERM
    assert not alive(pid)


def test_a_launchers_variables_do_not_reach_the_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_PORT", "CKPT_ENGINE_DEVICE_UUID"):
        monkeypatch.setenv(variable, "7")
    monkeypatch.setenv("CKPT_ENGINE_HOST_ID", "mine")
    children = Children(tmp_path, Signals())
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    child = children.start("env", ["-c", code], CKPT_ENGINE_CPU_DEVICES="1")
    child.process.wait(30)
    environment = child.announcement()
    children.end()
    assert environment is not None
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "MASTER_PORT", "CKPT_ENGINE_DEVICE_UUID"}
    assert environment["CKPT_ENGINE_HOST_ID"] == "mine"
    assert environment["CKPT_ENGINE_CPU_DEVICES"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_raise_only_where_they_may_and_once(signum: int) -> None:
    before = signal.getsignal(signum)
    with Signals() as signals:
        os.kill(os.getpid(), signum)  # held back: nothing may be broken off here
        with pytest.raises(Interrupted) as caught, signals.raising():
            pytest.fail("the signal was lost")
        assert caught.value.signum == signum
        os.kill(os.getpid(), signum)  # the clean-up is not broken off
    with Signals() as signals:
        reached = False
        with pytest.raises(Interrupted), signals.raising():
            with signals.deferred():
                os.kill(os.getpid(), signum)
                reached = True
            pytest.fail("the signal was lost")
        assert reached
    assert signal.getsignal(signum) is before


def test_two_free_ports() -> None:
    port = demo.two_free_ports()
    assert 1024 <= port < 65535


def test_digests_that_differ_are_named() -> None:
    demo.compare_digests("engine", {"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    with pytest.raises(demo.DemoFailed, match=r"3 of 3 .* a differs, c is missing, d is not in the files"):
        demo.compare_digests("engine", {"a": "1", "b": "2", "c": "3"}, {"a": "9", "b": "2", "d": "4"})


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("import ckpt_engine.embedded_engine.model as m; m.SIZES['tiny']['hidden_size'] = 'x'", "Error"),
        ("demo.two_free_ports = lambda: 70000", "the update ended with exit status 1"),
    ],
    ids=["before-any-engine", "update-fails"],
)
def test_a_failing_demo_says_so_and_leaves_nothing(short_path: Path, patch: str, message: str) -> None:
    code = f"import sys; from ckpt_engine.cli import demo\n{patch}\nsys.exit(demo.run_demo(size='tiny'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(short_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["verified"] is False
    assert message in document["error"]
    assert not list(short_path.glob("ckpt-engine-demo-*"))


def test_the_whole_demo(short_path: Path) -> None:
    code = "import sys; from ckpt_engine.cli import demo; sys.exit(demo.run_demo(size='tiny', keep=True))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(short_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["verified"], document["engines"], document["tensors"]) == (True, 2, 20)
    assert document["update_seconds"] > 0
    kept = Path(document["directory"])
    assert document["bytes"] == 205_440 < sum(f.stat().st_size for f in (kept / "checkpoint").iterdir())


def test_an_interrupted_demo_ends_its_engines(short_path: Path) -> None:
    code = "import sys; from ckpt_engine.cli import demo; sys.exit(demo.run_demo(size='tiny'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(short_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as running:
        assert running.stderr is not None
        while "Starting two engines" not in running.stderr.readline():
            assert running.poll() is None
        time.sleep(0.5)
        running.terminate()
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert json.loads(output) == {"verified": False, "error": "interrupted by SIGTERM"}
    assert not list(short_path.glob("ckpt-engine-demo-*"))
    # The engines' command lines name the directory.
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.append(entry.read_bytes())
    assert not [command for command in commands if str(short_path).encode() in command]
