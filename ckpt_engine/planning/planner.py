"""Makes plans, and keeps the last one: new weights with the layout of the old ones have the same plan."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_engine.metadata import RankMetas
from ckpt_engine.planning.plan import Assignment, UpdatePlan, make_plan


class Planner:
    """One rank's plans. `made`: how many were not those of the update before."""

    def __init__(self) -> None:
        self._last: tuple[object, UpdatePlan] | None = None
        self.made = 0

    def plan(
        self,
        checkpoint: str,
        metas: Mapping[int, RankMetas],
        layout: str,
        *,
        slot_nbytes: int,
        slot_count: int,
        budget: int,
        staging: bool,
        outside: Mapping[int, RankMetas],
        assign: Assignment | None,
    ) -> UpdatePlan:
        """As `make_plan`, or the last one, if it is still right.

        Args:
            layout: names who holds what, and where; empty: it is not known, and nothing is kept.
        """
        asked = (layout, slot_nbytes, slot_count, staging)
        if layout and not outside and self._last is not None and self._last[0] == asked:
            last = self._last[1]
            shape = last.needs.shape(
                slot_nbytes=slot_nbytes, slot_count=slot_count, budget=budget, staging=staging
            )
            if shape == (last.ring, last.staging_nbytes):  # the free memory may be another
                return last.named(checkpoint)
        self.made += 1
        plan = make_plan(
            checkpoint,
            metas,
            slot_nbytes=slot_nbytes,
            slot_count=slot_count,
            budget=budget,
            staging=staging,
            outside=outside,
            assign=assign,
        )
        self._last = (asked, plan) if layout and not outside else None
        return plan
