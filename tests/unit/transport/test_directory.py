"""Who joiners are told of: in one owner's directory, over real sockets, and its turns in this process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from leases_for_transport_tests import EPOCH, LAYOUT, LIMIT, NAME, SESSION, share_at

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import P2PError
from ckpt_engine.transport import directory as module
from ckpt_engine.transport.directory import Directory
from ckpt_engine.transport.lease_messages import LEASE_PROTOCOL, MAX_GROUPS, Announce, Found, Seek
from ckpt_engine.transport.lease_server import LeaseServer
from ckpt_engine.transport.leases import Announcement


class Asked:
    """A directory, and what each of who asked was told."""

    def __init__(self) -> None:
        self.told: dict[str, Found] = {}
        self.directory: Directory[str] = Directory(self.told.__setitem__)

    def seek(self, who: str, *, announces: bool = True, waits: bool = True, name: str = NAME) -> None:
        self.directory.seek(who, Seek(LEASE_PROTOCOL, SESSION, name, EPOCH, LAYOUT, announces, waits))

    def announce(self, who: str, group: str = "") -> None:
        self.directory.announce(who, Announce(group or who, who.encode()))


def test_each_is_told_of_those_before_it_once_they_have_announced_themselves() -> None:
    asked = Asked()
    for who in "abc":
        asked.seek(who)
    assert asked.told == {"a": Found(0, ())}
    asked.announce("a")
    assert asked.told["b"] == Found(1, ((b"a",),))
    assert "c" not in asked.told
    asked.announce("b")
    assert asked.told["c"] == Found(2, ((b"a",), (b"b",)))


def test_whoever_only_reads_holds_nobody_up() -> None:
    asked = Asked()
    asked.seek("a", announces=False)
    asked.seek("b")
    assert set(asked.told) == {"a", "b"}


def test_those_who_only_read_go_in_any_order_and_one_stays_to_announce() -> None:
    """The first that goes leaves nothing in the book: the others are known all the same."""
    asked = Asked()
    for who in "abc":
        asked.seek(who, announces=False)
    asked.directory.forget("a")
    asked.announce("b")
    asked.directory.forget("c")
    asked.seek("d")
    assert asked.told["d"] == Found(1, ((b"b",),))
    for who in "bd":
        asked.directory.forget(who)
    assert not asked.directory._books


def test_another_checkpoint_is_another_queue() -> None:
    asked = Asked()
    asked.seek("a")
    asked.seek("b", name="other")
    asked.announce("b")
    assert asked.told == {"a": Found(0, ()), "b": Found(0, ())}


def test_ranks_of_one_update_are_one_group_and_do_not_wait() -> None:
    asked = Asked()
    asked.seek("a")
    asked.seek("a1", waits=False)
    asked.announce("a1", "g")
    asked.announce("a", "g")
    asked.seek("b")
    assert asked.told["b"] == Found(1, ((b"a1", b"a"),))


def test_only_the_newest_are_told_of() -> None:
    asked = Asked()
    for number in range(MAX_GROUPS + 3):
        asked.seek(str(number))
        asked.announce(str(number))
    asked.seek("last")
    assert asked.told["last"].place == MAX_GROUPS + 3
    assert [group[0] for group in asked.told["last"].groups] == [b"3", b"4", b"5", b"6"]


@pytest.mark.parametrize("gone", ["a", "b"])
def test_who_is_gone_holds_nobody_up_and_is_not_told_of(gone: str) -> None:
    asked = Asked()
    for who in "abc":
        asked.seek(who)
    if gone == "b":
        asked.announce("a")
    asked.directory.forget(gone)
    asked.directory.forget(gone)
    if gone == "a":
        assert asked.told["b"] == Found(0, ())
        asked.announce("b")
        assert asked.told["c"] == Found(1, ((b"b",),))
    else:
        assert asked.told["c"] == Found(1, ((b"a",),))
    asked.directory.forget("c")
    asked.directory.forget({"a": "b", "b": "a"}[gone])
    assert not asked.directory._books


def test_who_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", -1.0)
    asked = Asked()
    asked.seek("a")
    asked.seek("b")
    assert "b" not in asked.told
    asked.directory.look_at_the_clock()
    assert asked.told["b"] == Found(0, ())
    asked.announce("a")  # late, but true
    asked.directory.look_at_the_clock()
    asked.seek("c")
    assert asked.told["c"] == Found(1, ((b"a",),))


def seek(server: LeaseServer, session: str = SESSION, epoch: str = EPOCH) -> tuple[Announcement, Found]:
    deadline = Deadline.after(LIMIT)
    return Announcement.seek(share_at(server, session=session, epoch=epoch), deadline, announces=True)


def test_announcements_of_many_megabytes_live_as_long_as_their_connections(server: LeaseServer) -> None:
    metas = bytes(range(256)) * (1 << 16)  # 16 MiB
    first, found = seek(server)
    assert found == Found(0, ())
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(seek, server)
        first.announce("g", metas)
        second, found = waiting.result(LIMIT)
    assert found == Found(1, ((metas,),))
    first.release()
    second.release()
    deadline = Deadline.after(LIMIT)
    while server._connections:
        assert not deadline.passed
    third, found = seek(server)
    third.release()
    assert found == Found(0, ())


@pytest.mark.parametrize(("session", "epoch"), [("d8" * 16, EPOCH), (SESSION, "e0")])
def test_strangers_are_told_nothing(server: LeaseServer, session: str, epoch: str) -> None:
    with pytest.raises(P2PError, match="out of date"):
        seek(server, session, epoch)


def test_a_withdrawn_checkpoint_has_no_directory(server: LeaseServer) -> None:
    announcement, _ = seek(server)
    announcement.announce("g", b"metas")
    assert server.withdraw(NAME, Deadline.after(0)) == ()
    with pytest.raises(P2PError, match="is not registered there any more"):
        seek(server)
    announcement.release()
    assert not [thread for thread in threading.enumerate() if thread.name == "ckpt-engine-lease-keeper"]
