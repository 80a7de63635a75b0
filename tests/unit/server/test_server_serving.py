"""Serving in the main thread: what a signal ends, and that the end is bounded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from ckpt_engine.server.failures import Cancelled, ServerStopping
from ckpt_engine.server.serving import CANCEL_SIGNAL, CancelledByRequest, Interrupted, MainThread

HERE = Path(__file__).parent
SECONDS = 20.0


@pytest.fixture
def main() -> Iterator[MainThread]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, CANCEL_SIGNAL)}
    yield MainThread()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_work_is_done_in_order_in_the_thread_that_runs(main: MainThread) -> None:
    futures = [main.submit(lambda number=number: (number, threading.current_thread())) for number in range(3)]
    failing: Future[float] = main.submit(lambda: 1 / 0)
    cancelled = main.submit(lambda: pytest.fail("it was cancelled"))
    cancelled.cancel()
    main.stop()
    main.run()
    assert [future.result(0) for future in futures] == [(n, threading.main_thread()) for n in range(3)]
    assert isinstance(failing.exception(0), ZeroDivisionError)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_is_at_work_and_what_waits(main: MainThread, signum: signal.Signals) -> None:
    seen: list[str] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signum)
            threading.Event().wait(SECONDS)
        except Interrupted as interrupt:
            # A second one does not break the clean-up off.
            os.kill(os.getpid(), signum)
            seen.append(str(interrupt))
            raise

    with main.signals():
        working, waiting = main.submit(work), main.submit(lambda: seen.append("not reached"))
        main.run()
        late = main.submit(lambda: seen.append("not reached"))
    name = signum.name
    assert seen == [f"the parameter server was ended by {name}"]
    with pytest.raises(ServerStopping, match=f"ended by {name}"):
        working.result(0)
    for future in (waiting, late):
        with pytest.raises(ServerStopping):
            future.result(0)
    assert main.signum == signum
    assert signal.getsignal(signum) is signal.SIG_IGN


def test_a_request_ends_what_is_at_work_and_only_that(main: MainThread) -> None:
    begun = threading.Event()
    seen: list[str] = []

    def work() -> None:
        try:
            begun.set()
            threading.Event().wait(SECONDS)
        except CancelledByRequest as cancel:
            os.kill(os.getpid(), CANCEL_SIGNAL)  # one from elsewhere means nothing
            seen.append(str(cancel))
            raise

    def ask() -> None:
        assert begun.wait(SECONDS)
        cancelled.append(main.cancel())

    cancelled: list[bool] = []
    with main.signals():
        assert not main.cancel()
        working, next_one = main.submit(work), main.submit(lambda: "done")
        next_one.add_done_callback(lambda _: main.stop())
        asking = threading.Thread(target=ask)
        asking.start()
        main.run()
        asking.join(SECONDS)
    assert cancelled == [True]
    assert seen == ["it was cancelled by a request"]
    with pytest.raises(Cancelled, match="cancelled by a request") as caught:
        working.result(0)
    assert not caught.value.committed
    assert next_one.result(0) == "done"
    assert main.signum is None


def test_a_signal_while_nothing_is_at_work(main: MainThread) -> None:
    with main.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        main.run()
    assert main.signum == signal.SIGTERM


def test_without_a_signal_the_handlers_are_put_back(main: MainThread) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with main.signals():
        assert signal.getsignal(signal.SIGTERM) is not before
        main.stop()
        main.run()
    assert signal.getsignal(signal.SIGTERM) is before


def run_script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


SERVE = """
import os, signal, sys, threading, time
from pathlib import Path
from api_for_server_tests import StubServer
from ckpt_engine.server import serving
from ckpt_engine.server.listening import UnixListener
ps = StubServer()
ps.close = lambda: print("closed", flush=True)
serving.GRACE_SECONDS = 0.5
"""


@pytest.fixture
def uds() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
    yield directory / "ps.sock"
    shutil.rmtree(directory)


def test_serving_ends_and_leaves_nothing(uds: Path) -> None:
    code = SERVE + (
        "def announce(listener):\n"
        "    print(listener, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(serving.serve(ps, lambda: UnixListener(Path(sys.argv[1])), announce=announce))\n"
        "print([thread.name for thread in threading.enumerate()])\n"
    )
    done = run_script(code, str(uds))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"unix:{uds}"
    assert set(lines[1:-2]) == {"closed"}
    assert lines[-2:] == ["15", "['MainThread']"]
    assert not done.stderr
    assert not uds.exists()


def test_an_end_that_a_library_holds_up_is_bounded(uds: Path) -> None:
    # As a wait inside a library may: it goes on after a signal, and no handler of Python's gets to run.
    code = SERVE + (
        "import ctypes\n"
        "def announce(listener):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    mutex = ctypes.create_string_buffer(64)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)\n"
        "serving.serve(ps, lambda: UnixListener(Path(sys.argv[1])), announce=announce)\n"
    )
    done = run_script(code, str(uds))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "not ended" in done.stderr
    assert not uds.exists()


def test_a_listener_that_cannot_be_made_closes_the_parameter_server() -> None:
    code = SERVE + "serving.serve(ps, lambda: 1 / 0)\n"
    done = run_script(code)
    assert done.returncode == 1
    assert done.stdout == "closed\n"
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_extra_names_what_to_install(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\nfrom ckpt_engine.cli.main import app\napp(['serve'])"
    )
    done = run_script(code)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The HTTP API could not import ")
    assert "pip install 'ckpt-engine[server]'" in done.stderr
    assert done.stderr.count("\n") == 1
