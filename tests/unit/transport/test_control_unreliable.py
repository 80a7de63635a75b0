"""What ranks and the control server say to each other is lost, spoilt or cut off: one outcome, and soon."""

from __future__ import annotations

from fleet_for_transport_tests import Fleet, wait_until

from ckpt_engine.transport.framing import LENGTH


def test_rank_0_hears_at_once_of_a_rank_that_could_not_read_it(pair: Fleet) -> None:
    server = pair.controls[0]._server
    assert server is not None
    server._clients[1].sock.send(LENGTH.pack(5) + b"\xff" * 5)
    wait_until(lambda: pair.controls[1].lost is not None, "rank 1 to give up")
    wait_until(lambda: 1 in server._rounds.lost, "rank 0 to hear of it")
