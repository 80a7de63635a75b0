"""Launches ranks on hosts of a network of their own. As root only: else they are skipped, but in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multihost.network import Network, permitted
from tests.support.joins import Launch, launcher
from tests.support.mooncake import need_mooncake
from tests.support.steered import Fleet

HERE = Path(__file__).parent
HOSTS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and not permitted():
            if os.environ.get("CI") and os.geteuid() == 0:
                raise pytest.UsageError("iproute2 is needed for the tests of several hosts: make system")
            item.add_marker(pytest.mark.skip(reason="needs root and iproute2 (make system)"))


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    need_mooncake()
    made = Network(HOSTS)
    yield made
    made.close()


@pytest.fixture
def launch(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """(ranks, hosts, first host) -> a fleet on these hosts, with workers of its own."""
    with launcher(tmp_path_factory, network.prefix) as launch_on:

        def start(size: int, hosts: int, first_host: int, *, ipv6: bool = False, **environment: str) -> Fleet:
            address = network.address6 if ipv6 else network.address
            return launch_on(
                size,
                hosts,
                first_host=first_host,
                on_host=network.environment6 if ipv6 else network.environment,
                MASTER_ADDR=address(first_host),
                **environment,
            )

        yield start
