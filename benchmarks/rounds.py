"""What the control server does for one update of many ranks, and what it sends: no sockets, one thread.

    python -m benchmarks.rounds --ranks 64,512,4096 --json

Every rank enters, votes and leaves, as in an update, with what it brings there; each message is decoded, and
what is told is encoded, as by the server's own thread. One JSON line for each number of ranks: processor time
of the server for one update, the same for each rank, and bytes that it sends to all ranks together.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from ckpt_engine.transport import control_messages as messages
from ckpt_engine.transport.framing import LENGTH
from ckpt_engine.transport.rounds import Rounds
from ckpt_engine.update.introduction import Introduction, ReadsByP2P

RANKS_OF_A_HOST = 8


def introduction(rank: int) -> bytes:
    """As long, and as unlike any other's, as a rank's on a GPU."""
    host = f"node-{rank // RANKS_OF_A_HOST:04d}"
    fields: dict[str, Any] = {
        "host": host,
        "device_type": "cuda",
        "device_uuid": f"GPU-{secrets.token_hex(16)}",
        "memory_pool": f"{host}-{rank % RANKS_OF_A_HOST}",
        "handle": f"ipc:///run/user/1000/ckpt-engine/{secrets.token_hex(8)}/w-{secrets.token_hex(16)}",
        "peer_path": f"/run/user/1000/ckpt-engine/{secrets.token_hex(8)}/peer",
        "free_memory": 1 << 36,
        "slot_nbytes": 1 << 28,
        "slot_count": 3,
        "metas_digest": "d" * 64,
        "token": "",
        "group_name": "nccl",
        "p2p": ReadsByP2P(transport="rdma", rdma_device=f"mlx5_{rank % RANKS_OF_A_HOST}"),
    }
    return msgspec.json.encode(Introduction(**fields))


class Server:
    """The rounds, and what would go through their sockets."""

    def __init__(self, world_size: int) -> None:
        self.sent = 0
        self.rounds = Rounds(self._tell, world_size)

    def _tell(self, ranks: Iterable[int], message: messages.ServerFrame) -> None:
        self.sent += len(messages.encode_frame(message)) * len([*ranks])

    def hear(self, rank: int, frame: bytes) -> None:
        message = messages.decode_rank_frame(frame[LENGTH.size :])
        assert isinstance(message, messages.RoundFrame)
        self.rounds.hear(rank, message)


def measure(world_size: int, rounds: int) -> dict[str, Any]:
    server = Server(world_size)
    brought = [messages.pack(introduction(rank)) for rank in range(world_size)]
    seconds = []
    for call in range(1, rounds + 2):
        frames: list[list[messages.RankFrame]] = [
            [
                messages.Enter(call, None, "update('a')", brought[rank], False, True)
                for rank in range(world_size)
            ],
            [messages.Vote(call, "") for _ in range(world_size)],
            [messages.Left(call) for _ in range(world_size)],
        ]
        encoded = [[messages.encode_frame(frame) for frame in kind] for kind in frames]
        server.sent = 0
        begin = time.process_time()
        for kind in encoded:
            for rank, frame in enumerate(kind):
                server.hear(rank, frame)
        seconds.append(time.process_time() - begin)
        assert not server.rounds.waiting()
    median = statistics.median(seconds[1:])
    return {
        "benchmark": "rounds",
        "ranks": world_size,
        "median_of": rounds,
        "seconds": round(median, 5),
        "microseconds_per_rank": round(1e6 * median / world_size, 2),
        "sent_bytes": server.sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="64,512,4096", help="numbers of ranks, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="updates after the first one")
    parser.add_argument("--json", action="store_true", help="only JSON lines (they are printed anyway)")
    arguments = parser.parse_args()
    for count in arguments.ranks.split(","):
        print(json.dumps(measure(int(count), arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
