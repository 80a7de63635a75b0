"""Lets the tests of this folder import its helper modules, whatever pytest's import mode."""

import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pinner_for_tests import maps


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory of this test alone; no map of its files may be left."""
    directory = Path("/dev/shm") / f"ckpt-engine-test-{uuid.uuid4().hex}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)
    assert not [line for line in maps() if str(directory) in line.path], "a map was left behind"
