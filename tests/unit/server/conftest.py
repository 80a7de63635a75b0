"""A rank's API over a stub, asked without a socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_for_server_tests import EVERYTHING, StubServer
from fastapi.testclient import TestClient

from ckpt_engine.server.app import create_app


@pytest.fixture
def ps() -> StubServer:
    return StubServer()


@pytest.fixture
def client(ps: StubServer) -> Iterator[TestClient]:
    with TestClient(create_app(ps, access=EVERYTHING)) as client:
        yield client
