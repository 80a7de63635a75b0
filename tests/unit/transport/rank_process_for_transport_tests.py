"""A rank that does what JSON lines on stdin say, and answers each with a JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any

from fleet_for_transport_tests import LIMIT, a_record, make_control, port_of

from ckpt_engine.deadline import Deadline
from ckpt_engine.errors import UpdateError
from ckpt_engine.transport.control import Control


class RankHere:
    control: Control

    def join(self, rank: int, size: int, port: int, stall: float) -> int:
        """Joins the world, or serves it as rank 0; answers with the port."""
        self.control = make_control(rank, size, port, stall)
        return port_of(self.control)

    def exchange(self, payload: str) -> dict[int, str]:
        self.round = self.control.open_round("meet")
        met = self.round.exchange(payload.encode(), Deadline.after(LIMIT))
        return {rank: data.decode() for rank, data in met.items()}

    def race(self, members: list[int], rounds: int) -> list[str]:
        """Aborts every round as soon as its members stand at the line; answers with what was decided."""
        decided = []
        for number in range(rounds):
            round_ = self.control.open_round("race", members)
            line = f"line-{number}"
            self.control.store.add(line, 1)
            while self.control.store.add(line, 0) < len(members):
                pass
            verdict = round_.abort(a_record(f"by rank {self.control.rank}"))
            assert verdict.record is not None
            decided.append(verdict.record.message)
            round_.leave()
        return decided

    def close(self) -> None:
        self.control.close()


def main() -> None:
    here = RankHere()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            answer = getattr(here, request.pop("do"))(**request)
        except UpdateError as error:
            answer = {"error": type(error).__name__, "message": error.record.message}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
