"""A rank without a worker: nothing it does in an update may wait for one."""

from __future__ import annotations

import inspect

from ckpt_engine.ipc.sender import WorkerChannel
from ckpt_engine.update.no_worker import Channel, NoWorker


def test_every_bucket_is_given_back_when_it_is_announced() -> None:
    channel = NoWorker()
    assert (channel.announced, channel.done) == (-1, -1)
    for index in range(5):
        channel.announce(index)
        assert (channel.announced, channel.done) == (index, index)


def test_there_is_nothing_to_wait_for_and_nobody_to_ask() -> None:
    channel = NoWorker()
    assert channel.ready and channel.released and channel.finished and channel.gone
    assert not channel.connected and not channel.touched
    assert channel.handle == ""  # not among the socket paths
    assert channel.worker_pid is None
    assert channel.wait_until_gone()
    assert channel.abort("reason")


def test_a_bucket_that_went_through_touches_no_worker() -> None:
    channel = NoWorker()
    channel.announce(0)
    channel.finish()
    channel.freed()
    channel.beat()
    channel.commit("1")
    channel.close()
    assert not channel.touched


def test_it_can_be_called_as_a_workers_channel_can() -> None:
    for name, method in inspect.getmembers(Channel, inspect.isfunction):
        if not name.startswith("_"):
            signature = inspect.signature(method)
            assert inspect.signature(getattr(NoWorker, name)) == signature, name
            theirs = inspect.signature(getattr(WorkerChannel, name))
            assert list(theirs.parameters) == list(signature.parameters), name
