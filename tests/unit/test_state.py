from __future__ import annotations

from ckpt_engine.state import SERVING_INITIAL, Weights, WeightsState


def test_what_was_touched_and_not_committed_is_incomplete_until_a_commit() -> None:
    state = WeightsState(SERVING_INITIAL)
    state.begin()
    assert state.now == Weights("updating")
    state.commit("7", "step-7")
    assert state.now == Weights("serving", "7", "step-7")
    state.begin()
    assert state.now == Weights("updating", "7", "step-7")
    state.fail("a worker died", touched=True)
    assert state.now == Weights("incomplete", reason="a worker died")
    assert not state.complete
    state.begin()
    assert not state.complete
    state.commit("8")
    assert state.now == Weights("serving", "8")
    assert state.complete


def test_a_commit_that_the_worker_may_not_have_heard_is_unknown() -> None:
    state = WeightsState(Weights("serving", "1", "a"))
    state.begin()
    state.lose("no goodbye")
    assert state.now == Weights("unknown", reason="no goodbye")
    state.begin()
    state.fail("refused", touched=False)
    assert state.now == Weights("unknown", reason="no goodbye")


def test_what_was_not_touched_is_as_before() -> None:
    state = WeightsState(Weights("unknown"))
    for before in (Weights("unknown"), Weights("serving", "1", "a"), Weights("incomplete", reason="why")):
        state = WeightsState(before)
        state.begin()
        state.fail("refused", touched=False)
        assert state.now == before


def test_an_update_that_broke_off_without_a_word_leaves_nothing_whole() -> None:
    state = WeightsState(SERVING_INITIAL)
    state.begin()
    assert not state.complete
    state.begin()
    state.fail("refused", touched=False)
    assert state.now.state == "incomplete"
    assert not state.complete
