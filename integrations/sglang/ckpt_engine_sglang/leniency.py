"""What SGLang's models leave unread of their own checkpoints, and compute where a checkpoint has it not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckpt_engine.loading.recording import Recording

_SCALE = re.compile(r"(_scale|_scale_inv|_zero_point|_global_scale|\.scale|_offset)\d*$")
"""What a quantised layer computes where the checkpoint does not hold it."""
_DRAFTERS = r"^(model\.)?mtp\."
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


def filled_well_enough(recording: Recording, quantized: Iterable[str]) -> set[str]:
    """Parameters of quantised modules: one write is enough, since they are repacked, and scales may be
    computed."""
    return {
        name
        for name in quantized
        if name in recording.parameters and (recording.parameters[name].regions or _SCALE.search(name))
    }
