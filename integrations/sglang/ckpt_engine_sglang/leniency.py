"""What SGLang's models leave unread of their own checkpoints, and compute where a checkpoint has it not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckpt_engine.loading.recording import Recording

_WEIGHTS = re.compile(r"(weight|weight_packed|qweight|weight_scale|weight_scale_inv|weight_scale_2|scales)$")
"""What a quantised layer never computes: without its new scales a new weight is another one."""
_DRAFTERS = r"^(model\.)?mtp[._]"
_TIED = r"lm_head\.weight$"
_OUTSIDE_LAYERS = r"^(?!(.*\.)?layers\.\d+\.).*(embed_tokens|lm_head|norm)\.weight$"


def passed_over(*, tied: bool, shares: bool) -> re.Pattern[str]:
    """Names of tensors that need not be read (`completeness.Rules.passed_over`).

    Args:
        tied: the model's output embedding is its input embedding.
        shares: there may be other pipeline stages: one passes over what stands before and behind its layers.
    """
    return re.compile(
        "|".join([_DRAFTERS, *([_TIED] if tied else []), *([_OUTSIDE_LAYERS] if shares else [])])
    )


def filled_well_enough(recording: Recording, quantized: Iterable[str], *, repacked: bool) -> set[str]:
    """Parameters of quantised modules that need not be filled wholly: caches' and inputs' scales, orders of
    columns and the like, which many checkpoints do not hold.

    Args:
        repacked: the load was recorded in a layout that is not the checkpoint's: one write is enough.
    """
    return {
        name
        for name in quantized
        if name in recording.parameters
        and (not _WEIGHTS.search(name) or (repacked and recording.parameters[name].regions))
    }
