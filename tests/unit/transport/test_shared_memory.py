"""Links inside a host: rings are swapped, notes arrive, deaths are named, strangers get nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_engine.deadline import Deadline
from ckpt_engine.devices import SharedRing
from ckpt_engine.errors import PeerLost, ProtocolError, UpdateTimeout
from ckpt_engine.ipc.reactor import Reactor
from ckpt_engine.transport import shared_memory
from ckpt_engine.transport.shared_memory import COPIED, STAGED, HostLinks

TOKEN = "update-17"
SECONDS = 60.0
PROMPT_SECONDS = 5.0
NBYTES = 8192


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


class Rank:
    """One rank of this host, with a ring full of its own number."""

    def __init__(self, base: Path, rank: int, nbytes: int = NBYTES) -> None:
        self.rank = rank
        self.path = str(base / f"peer-{rank}")
        self.reactor = Reactor()
        self.links = HostLinks(self.path, rank, self.reactor)
        self.ring = SharedRing.create(nbytes)
        self.ring.view(0, nbytes).fill_(rank + 1)
        self.notes: list[tuple[int, int, int]] = []

    def connect(
        self, paths: dict[int, str], *, seconds: float = SECONDS, poll: Callable[[], None] = lambda: None
    ) -> None:
        self.links.connect(
            {rank: path for rank, path in paths.items() if rank != self.rank},
            TOKEN,
            self.ring,
            lambda kind, rank, bucket: self.notes.append((kind, rank, bucket)),
            Deadline.after(seconds),
            poll,
        )

    def turn_until(self, done: Callable[[], bool], what: str) -> None:
        assert self.reactor.wait(done, Deadline.after(SECONDS), 0.05), f"waited in vain for {what}"

    def close(self) -> None:
        self.links.close()
        self.ring.close()


class Background:
    """A call in a thread, whose outcome a test asks for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.threw: BaseException | None = None

        def target() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - a test looks at it
                self.threw = error

        self.thread = threading.Thread(target=target, daemon=True)
        self.thread.start()

    def end(self, seconds: float = SECONDS) -> BaseException | None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"still at it after {seconds} s"
        return self.threw


@pytest.fixture
def ranks(base: Path) -> Iterator[list[Rank]]:
    """Three ranks that are not yet connected."""
    made = [Rank(base, rank) for rank in range(3)]
    yield made
    for rank in made:
        rank.close()
    assert list(base.iterdir()) == []
    assert ring_maps() == []


def connect_all(ranks: list[Rank]) -> None:
    paths = {rank.rank: rank.path for rank in ranks}
    calls = [Background(lambda rank=rank: rank.connect(paths)) for rank in ranks]
    assert [call.end() for call in calls] == [None] * len(ranks)


def ring_maps() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if "memfd:ckpt-engine-ring" in line]


def open_rings_and_sockets() -> int:
    gc.collect()  # torch's stores of earlier tests may be garbage still, with their sockets
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return sum(os.readlink(fd).startswith(("/memfd:", "socket:")) for fd in links if fd.is_symlink())


def hello(rank: Any = 1, token: Any = TOKEN, nbytes: Any = NBYTES, **more: object) -> bytes:  # noqa: ANN401
    return json.dumps({"rank": rank, "token": token, "nbytes": nbytes} | more).encode() + b"\n"


def call(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    sock.settimeout(SECONDS)
    return sock


# Meeting


def test_every_rank_sees_the_rings_of_all_others_read_only(ranks: list[Rank]) -> None:
    connect_all(ranks)
    for rank in ranks:
        others = [other for other in range(3) if other != rank.rank]
        assert rank.links.ranks == others
        for other in others:
            theirs = rank.links.ring_of(other).view(0, NBYTES)
            assert theirs.unique().tolist() == [other + 1]
            ranks[other].ring.view(100, 1).fill_(77)
            assert theirs[100] == 77
            ranks[other].ring.view(100, 1).fill_(other + 1)
    assert sorted(ring_maps()) == ["r--s"] * 6 + ["rw-s"] * 3


def test_ranks_may_have_rings_of_different_sizes(base: Path) -> None:
    pair = [Rank(base, 4), Rank(base, 9, nbytes=3 * NBYTES)]
    connect_all(pair)
    assert pair[0].links.ring_of(9).nbytes == 3 * NBYTES
    assert pair[1].links.ring_of(4).view(0, NBYTES).unique().tolist() == [5]
    for rank in pair:
        rank.close()


def test_a_lone_rank_waits_for_nobody(ranks: list[Rank]) -> None:
    ranks[0].connect({0: ranks[0].path}, seconds=0)
    assert ranks[0].links.ranks == []


def test_a_rank_that_does_not_come_is_named_at_the_deadline(ranks: list[Rank]) -> None:
    paths = {rank.rank: rank.path for rank in ranks}
    first = Background(lambda: ranks[0].connect(paths, seconds=0.5))
    second = Background(lambda: ranks[1].connect(paths, seconds=0.5))
    for error in (first.end(), second.end()):
        assert isinstance(error, UpdateTimeout)
        assert "ranks [2] of this host did not connect" in str(error)


def test_a_rank_that_is_gone_is_named_at_once(ranks: list[Rank]) -> None:
    ranks[0].links.close()
    with pytest.raises(PeerLost, match=f"rank 0 is gone: cannot connect to {ranks[0].path}"):
        ranks[1].connect({0: ranks[0].path})


def test_a_rank_that_gives_up_while_others_wait_for_its_answer_is_named(ranks: list[Rank]) -> None:
    """It has its own error to report, and does not come to accept them."""
    waiting = Background(lambda: ranks[1].connect({0: ranks[0].path}))
    assert ranks[0].reactor.wait(lambda: has_a_caller(ranks[0]), Deadline.after(SECONDS), 0.01)
    ranks[0].links.close()
    error = waiting.end(PROMPT_SECONDS)
    assert isinstance(error, PeerLost)
    assert "rank 0 is gone: the exchange of rings failed" in str(error)


def has_a_caller(rank: Rank) -> bool:
    """Whether somebody waits to be accepted."""
    return bool(select.select([rank.links._listener], [], [], 0)[0])


@pytest.mark.parametrize("waiter", [0, 2], ids=["who listens", "who connects"])
def test_what_poll_raises_ends_the_wait(ranks: list[Rank], waiter: int) -> None:
    """How a rank learns that the update was aborted elsewhere. Never taken for a stranger's fault."""
    for error in (ProtocolError("aborted"), TimeoutError("aborted"), KeyboardInterrupt("aborted")):
        turns = 0

        def poll(error: BaseException = error) -> None:
            nonlocal turns
            turns += 1
            if turns > 3:
                raise error

        silent = call(ranks[0].path)  # the listener is busy with somebody
        with pytest.raises(type(error), match="aborted"):
            ranks[waiter].connect({0: ranks[0].path, 2: ranks[2].path}, poll=poll)
        silent.close()
        assert ranks[waiter].links.ranks == []
    # Those who were left in the queue of rank 0 are no ranks any more.
    assert len(ring_maps()) == 3


def test_a_path_that_a_dead_rank_left_is_used_again(base: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(base / "peer-0"))
    pair = [Rank(base, 0), Rank(base, 1)]
    connect_all(pair)
    for rank in pair:
        rank.close()


# Strangers


STRANGERS: dict[str, tuple[bytes, bool]] = {
    "garbage": (b"\xff\xfe garbage\n", True),
    "http": (b"GET / HTTP/1.1\r\n", True),
    "too much": (b"x" * 5000, True),
    "deep": (b"[" * 4000 + b"\n", True),
    "a list": (b"[]\n", False),
    "another update": (hello(token="update-16"), True),
    "an unknown rank": (hello(rank=7), True),
    "a lower rank": (hello(rank=-1), True),
    "the rank itself": (hello(rank=0), True),
    "a rank as text": (hello(rank="1"), True),
    "no size": (json.dumps({"rank": 1, "token": TOKEN}).encode() + b"\n", True),
    "one field more": (hello(x=1), True),
    "silent": (b"", False),
    "half a hello": (hello()[:-5], True),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_gets_nothing_and_disturbs_nobody(
    ranks: list[Rank], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "HELLO_SECONDS", 0.2)
    words, with_descriptor = STRANGERS[kind]
    before = open_rings_and_sockets()
    stranger, brief = call(ranks[0].path), call(ranks[0].path)
    brief.close()
    if words and with_descriptor:
        socket.send_fds(stranger, [words], ranks[2].ring.descriptors())
    elif words:
        stranger.sendall(words)
    connect_all(ranks[:2])
    with contextlib.suppress(ConnectionResetError):  # closed before it read all
        assert socket.recv_fds(stranger, 4096, 8)[:2] == (b"", [])
    stranger.close()
    assert ranks[0].links.ranks == [1]
    assert ranks[0].links.ring_of(1).view(0, 1).item() == 2
    # The link itself: a socket and a ring on both ends.
    assert open_rings_and_sockets() == before + 4 + 2  # a map holds a descriptor of its own


def test_one_who_listens_in_place_of_a_rank_is_refused(ranks: list[Rank], base: Path) -> None:
    for answer in (hello(rank=3), hello(rank=0, token="update-16"), b"garbage\n"):
        before = open_rings_and_sockets()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(base / "false"))
        listener.listen()
        joining = Background(lambda: ranks[1].connect({0: str(base / "false")}))
        sock, _ = listener.accept()
        socket.send_fds(sock, [answer], ranks[2].ring.descriptors())
        error = joining.end()
        assert isinstance(error, PeerLost if answer == b"garbage\n" else ProtocolError)
        assert "rank 0" in str(error)
        sock.close()
        listener.close()
        os.unlink(base / "false")
        assert open_rings_and_sockets() == before
    assert len(ring_maps()) == 3


@pytest.mark.parametrize(("count", "nbytes"), [(0, NBYTES), (2, NBYTES), (1, NBYTES + 1), (1, -1)])
def test_a_ring_that_is_none_is_refused(ranks: list[Rank], count: int, nbytes: int) -> None:
    before = open_rings_and_sockets()
    sock = call(ranks[0].path)
    socket.send_fds(sock, [hello(nbytes=nbytes)], ranks[1].ring.descriptors() * count)
    with pytest.raises(ProtocolError, match=r"needs one descriptor|is not a memfd"):
        ranks[0].connect({1: ranks[1].path})
    sock.close()
    assert open_rings_and_sockets() == before
    assert ranks[0].links.ranks == []


# Notes


def test_notes_arrive_in_order_with_who_sent_them(ranks: list[Rank]) -> None:
    connect_all(ranks)
    for bucket in range(2000):
        ranks[0].links.tell(1, STAGED, bucket)
        ranks[2].links.tell(1, COPIED, 2**32 - 1 - bucket)
        if bucket % 100 == 99:  # a socket's buffer takes a few hundred
            ranks[1].turn_until(lambda bucket=bucket: len(ranks[1].notes) == 2 * bucket + 2, "the notes")
    by_rank = {rank: [note for note in ranks[1].notes if note[1] == rank] for rank in (0, 2)}
    assert by_rank[0] == [(STAGED, 0, bucket) for bucket in range(2000)]
    assert by_rank[2] == [(COPIED, 2, 2**32 - 1 - bucket) for bucket in range(2000)]
    assert ranks[0].notes == ranks[2].notes == []


def test_a_note_in_pieces_is_put_together(ranks: list[Rank]) -> None:
    sock = call(ranks[0].path)
    socket.send_fds(sock, [hello()], ranks[1].ring.descriptors())
    ranks[0].connect({1: ranks[1].path})
    for data in (struct.pack("<BI", STAGED, 258), struct.pack("<BIBI", COPIED, 1, STAGED, 2)[:7]):
        for byte in data:
            sock.sendall(bytes([byte]))
            ranks[0].reactor.turn(1)
    assert ranks[0].notes == [(STAGED, 1, 258), (COPIED, 1, 1)]
    sock.close()


# The end


def test_a_rank_that_leaves_is_named_by_the_reactor(ranks: list[Rank]) -> None:
    connect_all(ranks)
    ranks[0].links.tell(1, STAGED, 5)
    ranks[0].links.close()
    with pytest.raises(PeerLost, match="rank 0 is gone: it died or left the update"):
        ranks[1].turn_until(lambda: False, "its end")
    assert ranks[1].notes == [(STAGED, 0, 5)], "what it said before counts"
    with pytest.raises(PeerLost, match="rank 0 is gone: its link is closed or full"):
        ranks[1].links.tell(0, COPIED, 5)
    # The others are still there, and its ring stays readable until this rank leaves.
    ranks[1].links.tell(2, STAGED, 1)
    ranks[2].links.leaving = True
    ranks[2].turn_until(lambda: bool(ranks[2].notes), "a note")
    assert ranks[1].links.ring_of(0).view(0, 1).item() == 1


def test_who_is_leaving_too_does_not_mind(ranks: list[Rank]) -> None:
    connect_all(ranks[:2])
    ranks[0].links.leaving = True
    ranks[1].links.close()
    ranks[0].turn_until(lambda: not ranks[0].reactor._callbacks, "the end of the link")


RANK_1 = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shared_memory import Rank
base = Path(sys.argv[1])
rank = Rank(base, 1)
rank.connect({{0: str(base / "peer-0")}})
rank.links.tell(0, 1, 3)
sys.stdin.read()
"""


def test_a_killed_rank_is_named_at_once(base: Path) -> None:
    survivor = Rank(base, 0)
    process = subprocess.Popen([sys.executable, "-c", RANK_1, str(base)], stdin=subprocess.PIPE)
    try:
        survivor.connect({1: str(base / "peer-1")})
        survivor.turn_until(lambda: survivor.notes == [(STAGED, 1, 3)], "its note")
        assert survivor.links.ring_of(1).view(0, NBYTES).unique().tolist() == [2]
        process.kill()
        started = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 is gone"):
            survivor.turn_until(lambda: False, "its death")
        assert time.monotonic() - started < PROMPT_SECONDS
    finally:
        process.kill()
        process.communicate()
        survivor.close()


def test_closing_leaves_nothing(base: Path) -> None:
    before = open_rings_and_sockets()
    ranks = [Rank(base, rank) for rank in range(3)]
    connect_all(ranks)
    for rank in ranks:
        rank.links.close()
        rank.links.close()
        assert rank.links.ranks == []
        assert rank.reactor._callbacks == {}
    assert ring_maps() == ["rw-s"] * 3
    assert list(base.iterdir()) == []
    for rank in ranks:
        rank.ring.close()
    assert open_rings_and_sockets() == before
