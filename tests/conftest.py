"""For every test: an interrupt interrupts, also where the tests run in a shell's background."""

import signal


def pytest_configure() -> None:
    """Take SIGINT as in a terminal: shells ignore it in background jobs, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
