from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

# Lets the tests of this folder import its helper module, whatever pytest's import mode.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def base() -> Iterator[Path]:
    """A base directory for sockets; pytest's own are too long for a socket's path."""
    path = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context of the test's own: `term` would wait for ever if a socket of it were left open."""
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)
