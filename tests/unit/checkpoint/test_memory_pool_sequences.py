"""Any sequence of registering, failing and unregistering, with and without the pool, against a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_files_for_tests import contents, expected, random_tensor
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from pinner_for_tests import FakePinner

from ckpt_engine.checkpoint import CheckpointRegistry
from ckpt_engine.errors import CheckpointError


def failing_copy(*_: object) -> None:
    raise CheckpointError("lost")


NAMES = st.sampled_from("abc")
SHAPES = st.dictionaries(
    st.sampled_from(["t0", "t1", "t2", "t3"]),
    st.tuples(st.sampled_from(["bfloat16", "int8", "float64"]), st.lists(st.integers(0, 40), max_size=2)),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("register"), NAMES, SHAPES, st.booleans(), st.sampled_from([None, "copy", "pin"])),
        st.tuples(st.just("unregister"), NAMES, st.booleans()),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
@example([("register", "a", {}, True, None), ("unregister", "a", False), ("unregister", "a", True)])
def test_any_sequence(steps: list[Any]) -> None:
    """Against a model: names with their tensors, who is in the pool, and how many bytes the pool has."""
    model: dict[str, tuple[dict[str, torch.Tensor], bool]] = {}
    pool_nbytes = 0
    epochs: set[str] = set()
    with FakePinner() as pinner:
        held = CheckpointRegistry(threads=2, pinner=pinner)
        for number, step in enumerate(steps):
            note(f"{step}")
            name = step[1]
            in_pool = next((other for other, (_, pooled) in model.items() if pooled), None)
            if step[0] == "unregister":
                force = step[2]
                freed = force and in_pool in (None, name) and pool_nbytes > 0
                assert held.unregister(name, force=force) == (name in model or bool(freed))
                model.pop(name, None)
                pool_nbytes = 0 if freed else pool_nbytes
            else:
                _, _, shapes, pooled, failing = step
                tensors = {
                    key: random_tensor(dtype, tuple(shape), seed=number)
                    for key, (dtype, shape) in shapes.items()
                }
                with pytest.MonkeyPatch.context() as patch:
                    if failing == "copy":
                        patch.setattr("ckpt_engine.checkpoint.loader._file_tasks", failing_copy)
                    pinner.fail_at = pinner.calls if failing == "pin" else None
                    nbytes = packed_nbytes(tensors)
                    made = not pooled or nbytes > pool_nbytes
                    refused = name in model or (pooled and in_pool is not None)
                    fails = refused or failing == "copy" or (failing == "pin" and made and nbytes > 0)
                    if fails:
                        with pytest.raises(CheckpointError):
                            held.register(name, named_tensors=tensors, use_shared_memory_pool=pooled)
                        if pooled and not refused and nbytes > pool_nbytes:
                            pool_nbytes = 0  # the old one went first, and the new one with the failure
                    else:
                        checkpoint = held.register(name, named_tensors=tensors, use_shared_memory_pool=pooled)
                        assert checkpoint.epoch not in epochs
                        epochs.add(checkpoint.epoch)
                        model[name] = (tensors, pooled)
                        pool_nbytes = max(pool_nbytes, nbytes) if pooled else pool_nbytes
            assert held.names() == sorted(model)
            assert held._pool.nbytes == pool_nbytes
            for other, (tensors, pooled) in model.items():
                assert contents(held.get(other)) == expected(tensors)
                assert held.get(other).pooled == pooled
            pinned = [packed_nbytes(tensors) for tensors, pooled in model.values() if not pooled]
            assert sorted(nbytes for nbytes, _ in pinner.held.values()) == sorted(
                nbytes for nbytes in [*pinned, pool_nbytes] if nbytes
            )
        held.close()


def packed_nbytes(tensors: dict[str, torch.Tensor]) -> int:
    """What an arena for them has, by the rule: sorted by name, each aligned to 256 bytes."""
    end = 0
    for _, tensor in sorted(tensors.items()):
        end = -(-end // 256) * 256 + tensor.numel() * tensor.element_size()
    return end
