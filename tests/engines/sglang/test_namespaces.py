"""Two servers on two hosts that share nothing but a switch: network namespaces. As root, with iproute2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.sglang.parameter_servers import launch_on_hosts
from tests.engines.sglang.servers import WAIT, Checkpoints, Server
from tests.multihost.network import Network, permitted

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not permitted(), reason="needs root and iproute2 (make system)"),
]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def waiting(network: Network, checkpoints: Checkpoints, log: Callable[[str], Path]) -> Iterator[list[Server]]:
    """One on each host, both without weights."""
    with ExitStack() as ending:
        made = []
        for host in (0, 1):
            with network.inside(host):
                server = Server(
                    *(checkpoints("llama", 1), log(f"namespace-{host}"), WAIT),
                    host=f"namespace-{host}",
                    address=network.address(host),
                    SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="600",
                    GLOO_SOCKET_IFNAME="lo",
                )
            ending.callback(server.close)
            made.append(server)
        for host, server in enumerate(made):
            with network.inside(host):
                server.wait()
        yield made


def test_one_launch_updates_both(network: Network, waiting: list[Server], checkpoints: Checkpoints) -> None:
    for seed in (1, 2):
        done = launch_on_hosts(
            waiting,
            checkpoints("llama", seed),
            "--verify",
            master=network.address(0),
            on_host=network.inside,
            GLOO_SOCKET_IFNAME="eth0",
        )
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "checksums of 1 ranks of 2 servers compared" in done[0].stdout
        states = []
        for host, server in enumerate(waiting):
            with network.inside(host):
                assert server.client.is_ready()
                assert server.client.weight_version() == "everywhere"
                states.append(server.state())
                server.load_from_disk(checkpoints("llama", seed))
                states.append(server.state())
        assert all(state == states[0] for state in states)
