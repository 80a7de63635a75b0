"""The command's launcher, and that nothing is left when it is told to end; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from ckpt_engine_sglang.launch import _born, _descendants
from safetensors.torch import save_file

pytestmark = pytest.mark.timeout(400)
STARTS_SECONDS = 300.0
PARENT = "import sys; from ckpt_engine_sglang.launch import run_in_place; sys.exit(run_in_place({!r}, {}))"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", flush=True)
time.sleep(600)
"""


def end(process: subprocess.Popen[str], signum: int, seconds: float) -> tuple[int, Sequence[int]]:
    """The exit status, and which of the processes that it had started live on."""
    started = _descendants(process.pid)
    assert started
    process.send_signal(signum)
    try:
        process.wait(seconds)
    finally:
        left = [pid for pid, born in started.items() if born and _born(pid) == born and not is_zombie(pid)]
        for pid in [*left, *([process.pid] if process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return process.returncode, left


def is_zombie(pid: int) -> bool:
    """Dead, but not yet waited for by whoever is its parent now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def start(code: str, grace: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(command, grace)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_the_command_s(status: int) -> None:
    command = [sys.executable, "-c", f"raise SystemExit({status})"]
    done = subprocess.run(
        [sys.executable, "-c", PARENT.format(command, 5)], timeout=STARTS_SECONDS, check=False
    )
    assert done.returncode == status


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_goes_on(signum: signal.Signals) -> None:
    process = start("import time; print('started', flush=True); time.sleep(600)", 300)
    assert end(process, signum, 120) == (128 + signum, [])


def test_what_does_not_end_is_killed_with_all_that_it_started() -> None:
    process = start(STUBBORN, 1)
    assert len(_descendants(process.pid)) == 2
    assert end(process, signal.SIGTERM, 120) == (128 + signal.SIGTERM, [])


def test_the_command_and_its_ranks_end(tmp_path: Path) -> None:
    """While its ranks wait for a server that does not serve yet."""

    class Starting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    with ThreadingHTTPServer(("127.0.0.1", 0), Starting) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            process = subprocess.Popen(
                [
                    *(
                        sys.executable,
                        "-m",
                        "ckpt_engine_sglang.sglang_update",
                        "--checkpoint-path",
                        tmp_path,
                    ),
                    *("--endpoint", f"http://127.0.0.1:{server.server_address[1]}"),
                    *("--inference-parallel-size", "2"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={each: value for each, value in os.environ.items() if each != "RANK"},
                text=True,
            )
            assert process.stderr is not None
            waits = next((line for line in process.stderr if "waiting up to 600 s for SGLang at" in line), "")
            told: list[str] = []
            drain = threading.Thread(target=lambda: told.extend(process.stderr or ()))
            drain.start()
            assert "HTTP 503" in waits
            assert len(_descendants(process.pid)) >= 3, "torchrun, and two ranks"
            status, left = end(process, signal.SIGTERM, 120)
            drain.join()
            process.stderr.close()
            assert (status, left) == (128 + signal.SIGTERM, [])
            assert "forcefully" not in "".join(told), "torchrun killed what did not end within its 30 s"
        finally:
            server.shutdown()
            thread.join()
