"""The module that SGLang's own handler imports as `checkpoint_engine.worker`, in versions whose layout the
plugin does not know.

It knows SGLang's model by the method that it is to load with, so that it still refuses tensors that are not
the model's before a byte moves, and it never waits without a deadline. What it cannot do is said in the
adapter's README.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zmq

from ckpt_engine.compat.checkpoint_engine import worker
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.ipc.receiver import Run
from ckpt_engine.loading.completeness import Rules, check_complete, check_names
from ckpt_engine.loading.rehearsal import NotRehearsable, rehearse
from ckpt_engine_sglang.leniency import passed_over
from ckpt_engine_sglang.options import Options, parse_options, split_options

__all__ = ["update_weights_from_ipc"]

logger = logging.getLogger(__name__)


def update_weights_from_ipc(
    zmq_ctx: zmq.Context[Any],
    zmq_handle: str,
    device_id: int | str | None,
    *,
    run: Run,
    post_hook: Callable[[], object] | None = None,
) -> None:
    """As the reference's: raises what went wrong, which SGLang's handler makes its answer.

    Args:
        run: the model's `load_weights`.
    """
    model = getattr(run, "__self__", None)
    zmq_handle, text = split_options(zmq_handle)

    def prepare(tensors: Sequence[TensorLayout]) -> None:
        options = parse_options(text)
        if isinstance(model, torch.nn.Module):
            check(model, tensors, options)

    worker.update_weights_from_ipc(
        zmq_ctx, zmq_handle, device_id, run=run, prepare=prepare, post_hook=post_hook
    )


def check(model: torch.nn.Module, tensors: Sequence[TensorLayout], options: Options | None = None) -> None:
    """Raises WeightsMismatch where the tensors are not the model's: all of them, and no others, but for what
    the options allow.

    Layers that are quantised, and models that need values to load, are not checked.
    """
    methods = (type(getattr(module, "quant_method", None)).__name__ for module in model.modules())
    if any(name != "NoneType" and not name.startswith("Unquantized") for name in methods):
        logger.warning("the model is quantised: its update's tensors are not checked")
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(next((each.dtype for each in model.parameters()), before))
    try:
        recording = rehearse(model, [tensors])
    except NotRehearsable:
        logger.warning("the model cannot be asked without values: its update's tensors are not checked")
        return
    finally:
        torch.set_default_dtype(before)
    options = options or Options()
    text = getattr(model, "config", None)
    # Other ranks may hold the layers and experts that this one passes over.
    tied = bool(getattr(text, "tie_word_embeddings", False))
    rules = Rules(
        partial=options.partial,
        ignored=options.ignored,
        shares=True,
        passed_over=passed_over(tied=tied, shares=True),
    )
    check_names(tensors, recording.taken, rules)
    check_complete(recording, rules)
