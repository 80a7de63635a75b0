"""Two servers on two hosts, as far as the parameter servers can tell, in one update."""

from __future__ import annotations

import re

import pytest

from tests.engines.sglang.parameter_servers import launch_on_hosts
from tests.engines.sglang.servers import Checkpoints, Server

pytestmark = pytest.mark.timeout(600)


def test_one_launch_updates_both(pair: tuple[Server, Server], checkpoints: Checkpoints) -> None:
    pair[0].fail()
    for seed in (2, 1):
        done = launch_on_hosts(pair, checkpoints("llama", seed), "--verify")
        assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "checksums of 1 ranks of 2 servers compared" in done[0].stdout
        assert re.search(r"^update [\d.]+ s$", done[0].stdout, re.MULTILINE)
        assert pair[0].state() == pair[1].state()
        assert pair[0].generate()[1] == pair[1].generate()[1] == "everywhere"
    received = pair[1].state()
    pair[1].load_from_disk(checkpoints("llama", 1))
    assert received == pair[1].state()


def test_one_server_that_fails_keeps_both_from_it(
    pair: tuple[Server, Server], checkpoints: Checkpoints
) -> None:
    pair[0].fail(at="load", rank=0, action="raise")
    try:
        done = launch_on_hosts(pair, checkpoints("llama", 2))
    finally:
        pair[0].fail()
    assert [each.returncode for each in done] == [1, 1]
    for each in done:
        assert "injected before load" in each.stderr
        assert "host here" in each.stderr
    done = launch_on_hosts(pair, checkpoints("llama", 1))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert pair[0].state() == pair[1].state()
