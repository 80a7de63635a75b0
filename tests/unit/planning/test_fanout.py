"""Fan-out: times worked out by hand, and what holds of every plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_engine.errors import PlanError
from ckpt_engine.planning.fanout import OWNERS, FanOutRates, fan_out, plan_fan_out, predict_fan_out

reproducible = settings(derandomize=True, print_blob=True, deadline=None, max_examples=100)
SAME = FanOutRates(owners=1, joiner=1)


def test_shapes() -> None:
    assert fan_out(4, owner_readers=1, joiner_readers=1).sources == (OWNERS, 0, 1, 2)
    assert fan_out(5, owner_readers=2, joiner_readers=1).sources == (OWNERS, OWNERS, 0, 1, 2)
    assert fan_out(7, owner_readers=1, joiner_readers=2).sources == (OWNERS, 0, 0, 1, 1, 2, 2)


def test_a_chain_is_late_by_a_bucket_for_each_before() -> None:
    """Ten buckets of one second each: the first joiner has all after 10 s, the fourth after 13."""
    found = predict_fan_out(fan_out(4, owner_readers=1, joiner_readers=1), [1] * 10, SAME)
    assert (found.first, found.seconds, found.owner_nbytes) == (10, 13, 10)


def test_all_from_the_owners_take_turns() -> None:
    """Four joiners share what the owners send: 40 s, four times the bytes."""
    found = predict_fan_out(fan_out(4, owner_readers=4, joiner_readers=1), [1] * 10, SAME)
    assert (found.seconds, found.owner_nbytes) == (40, 40)


def test_a_tree_sends_each_byte_twice() -> None:
    """Three joiners, two below the first: it sends two streams at half the rate, so those take 20 s, and the
    second in which the first had nothing yet."""
    found = predict_fan_out(fan_out(3, owner_readers=1, joiner_readers=2), [1] * 10, SAME)
    assert found.seconds == pytest.approx(21)


def test_owners_that_can_send_more_feed_two_chains() -> None:
    """With twice a joiner's rate the owners feed two chains: half as long, at the same speed."""
    found = plan_fan_out(16, [1] * 10, FanOutRates(owners=2, joiner=1))
    assert (found.plan.owner_readers, found.plan.joiner_readers) == (2, 1)
    assert found.seconds == pytest.approx(10 + 7)


def test_one_bucket_goes_down_a_tree() -> None:
    """Nothing to pipeline: with 15 joiners a chain takes 15 s, a binary tree 1 + 2 + 2 + 2."""
    found = plan_fan_out(15, [1], SAME, most_owner_readers=1)
    assert found.plan.joiner_readers > 1
    assert found.seconds == pytest.approx(7)


@reproducible
@given(st.integers(1, 40), st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 3))
def test_properties(joiners: int, buckets: list[int], most: int) -> None:
    found = plan_fan_out(joiners, buckets, SAME, most_owner_readers=most)
    # Everybody is fed, by somebody who is fed before, and the owners' load is bounded.
    assert len(found.plan.sources) == joiners
    assert all(source < joiner for joiner, source in enumerate(found.plan.sources))
    assert found.plan.sources.count(OWNERS) <= most
    assert found.owner_nbytes == sum(buckets) * found.plan.sources.count(OWNERS)
    for joiner in range(joiners):
        assert found.plan.sources.count(joiner) <= found.plan.joiner_readers
    # No faster than a joiner can receive, and no slower than one chain.
    chain = predict_fan_out(fan_out(joiners, owner_readers=1, joiner_readers=1), buckets, SAME)
    assert sum(buckets) * (1 - 1e-9) <= found.seconds <= chain.seconds + 1e-5


@pytest.mark.parametrize("bad", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_none_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(PlanError, match="give at least one of each"):
        fan_out(bad[0], owner_readers=bad[1], joiner_readers=bad[2])
