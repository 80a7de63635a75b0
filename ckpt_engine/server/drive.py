"""Runs an operation on this rank, or on all ranks at once from rank 0."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from ckpt_engine.errors import CkptEngineError, ConfigError
from ckpt_engine.server.all_ranks import RankServers
from ckpt_engine.server.api_models import AllRanksAnswer, AllRanksError, ErrorBody, RankAnswer
from ckpt_engine.server.failures import body_of, status_of, to_json
from ckpt_engine.server.operations import Operations

ANSWER_SLACK_SECONDS = 30.0
"""How much longer than an operation's own timeout a rank may take to answer: failing takes time too."""

UNDO_SECONDS = 30.0

M = TypeVar("M", bound=BaseModel)


@dataclass(kw_only=True, frozen=True)
class Call(Generic[M]):
    """An operation on a checkpoint.

    `work`: this rank's part; it blocks. `body`: what a rank is sent. `route`: behind the checkpoint's name.
    `seconds`: how long it may take. `undo`: takes this rank's part back when another's failed (DELETE does it
    on other ranks); None: nothing to take back. `lenient`: a status that is no failure as long as one rank
    succeeded.
    """

    operation: str
    checkpoint: str
    method: str
    route: str
    query: str = ""
    work: Callable[[], M]
    body: Callable[[int], BaseModel] | None = None
    seconds: float
    undo: Callable[[], BaseModel] | None = None
    lenient: int | None = None

    @property
    def checkpoint_path(self) -> str:
        return f"/v1/checkpoints/{quote(self.checkpoint, safe='')}"

    @property
    def path(self) -> str:
        path = f"{self.checkpoint_path}/{self.route}" if self.route else self.checkpoint_path
        return path + self.query


class NotAllRanks(CkptEngineError):
    """Some rank failed; `error` is the answer to give."""

    def __init__(self, status: int, error: AllRanksError) -> None:
        self.status = status
        self.error = error
        super().__init__(error.message)


class Driver:
    """`servers`: every rank's server; None: they are not known."""

    def __init__(
        self, rank: int, world_size: int, operations: Operations, servers: RankServers | None
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._operations = operations
        self._servers = servers

    def check(self) -> None:
        """Raises ConfigError where this rank cannot drive the others."""
        if self._rank != 0:
            raise ConfigError(f"all_ranks: only rank 0 can ask all ranks, and this is rank {self._rank}")
        if self._servers is None and self._world_size > 1:
            raise ConfigError(
                "all_ranks: this server was not told where the other ranks' servers are: start them with "
                "`ckpt-engine serve`, or give create_app(servers=...)"
            )

    async def run(self, call: Call[M], all_ranks: bool) -> M | AllRanksAnswer:
        """The operation's answer, or `AllRanksAnswer`.

        Raises:
            NotAllRanks: with `all_ranks`, a rank failed.
            CkptEngineError: the operation's own error; with `all_ranks`, nothing was begun on any rank.
        """
        if all_ranks:
            self.check()
            return await self._operations.exclusive(
                call.operation, call.checkpoint, lambda: self._on_all(call)
            )
        return await self._operations.exclusive(
            call.operation, call.checkpoint, lambda: self._operations.blocking(call.work)
        )

    async def _on_all(self, call: Call[Any]) -> AllRanksAnswer:
        others = range(1, self._world_size)
        if self._servers is not None:
            await self._servers.check(others, self._world_size)
        found = await asyncio.gather(
            self._answer(call.work),
            *(self._ask(rank, call.method, call.path, call, call.seconds) for rank in others),
        )
        answers = dict(enumerate(found))
        done = [rank for rank, answer in answers.items() if answer.status == 200]
        failed = {
            rank: answer.status
            for rank, answer in answers.items()
            if rank not in done and not (done and answer.status == call.lenient)
        }
        if not failed:
            return AllRanksAnswer(ranks=answers)
        if call.undo is not None:
            undone = await asyncio.gather(
                *(
                    self._ask(rank, "DELETE", call.checkpoint_path, None, UNDO_SECONDS)
                    if rank
                    else self._answer(call.undo)
                    for rank in done
                )
            )
            for rank, answer in zip(done, undone, strict=True):
                answers[rank].undone = answer.status == 200
        worst = max(failed.values())
        raise NotAllRanks(worst, _error_for_all(answers, list(failed), worst))

    async def _ask(
        self, rank: int, method: str, path: str, call: Call[Any] | None, seconds: float
    ) -> RankAnswer:
        assert self._servers is not None
        body = to_json(call.body(rank).model_dump()) if call and call.body else None
        return await self._servers.ask(rank, method, path, body, seconds + ANSWER_SLACK_SECONDS)

    async def _answer(self, work: Callable[[], BaseModel]) -> RankAnswer:
        """This rank's part, in the form that the other ranks answer in."""
        try:
            done = await self._operations.blocking(work)
        except Exception as error:  # noqa: BLE001 - an answer among others
            return RankAnswer(status=status_of(error), answer=body_of(error).model_dump())
        return RankAnswer(status=200, answer=done.model_dump(mode="json"))


def _error_for_all(answers: dict[int, RankAnswer], failed: list[int], worst: int) -> AllRanksError:
    first = next(rank for rank in failed if answers[rank].status == worst)
    try:
        error = ErrorBody.model_validate(answers[first].answer)
    except ValidationError:
        error = ErrorBody(error_type="UnknownAnswer", message=str(answers[first].answer)[:1000])
    message = f"{len(failed)} of {len(answers)} ranks failed; rank {first}: {error.message}"
    return AllRanksError(**(error.model_dump() | {"message": message, "ranks": answers}))
