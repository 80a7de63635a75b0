"""Which of a model's weights SGLang laid out anew when it had loaded them, and whether it knows the way back.

Quantised layers and fused experts may be transposed, repacked or quantised once they are loaded; then the
next checkpoint does not fit them. SGLang's quantisation methods undo that where they have
`restore_weights_before_loading`, which some have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ckpt_engine.loading.recording import Layout, Recording, layout_of
from ckpt_engine.loading.rehearsal import NotRehearsable, WeightsMismatch, bare_tensors, named_parameters
from ckpt_engine_sglang import versions

_ATTRIBUTE = "_ckpt_engine_layouts"
_SHOWN = 3


def remember(model: torch.nn.Module, *_args: object, **_options: object) -> None:
    """When SGLang made the model, and loaded nothing yet: what a checkpoint's tensors are loaded into."""
    setattr(model, _ATTRIBUTE, _layouts(named_parameters(model)))


def changed(model: torch.nn.Module, now: Mapping[str, torch.Tensor] | None = None) -> list[str]:
    """Parameters that a checkpoint cannot be loaded into as they are, and how they were; empty also for a
    model that is not remembered."""
    found = _layouts(named_parameters(model) if now is None else now)
    told = []
    for name, layout in getattr(model, _ATTRIBUTE, {}).items():
        if name not in found:
            told.append(f"{name}, which is gone")
        elif found[name] != layout:
            told.append(f"{name}, {_text(layout)} when made and {_text(found[name])} now")
    return told


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors without storage in the place of the model's, in the layout that checkpoints are loaded into.

    Raises:
        NotRehearsable: the way there needs values.
    """
    with bare_tensors(model):
        try:
            versions.restore(model, torch.device("cpu"))  # moves nothing there
        except Exception as error:
            raise NotRehearsable(f"{type(model).__name__} needs values to restore: {error!r}") from error
        yield named_parameters(model)


def no_way_back(model: torch.nn.Module) -> str | None:
    """Why another checkpoint cannot be loaded into this model, whatever its tensors are."""
    before = changed(model)
    if not before:
        return None
    try:
        with restored(model) as parameters:
            after = changed(model, parameters)
    except NotRehearsable as error:
        return f"nobody can tell whether SGLang can undo the layout of {_listed(before)}: {error}"
    if not after:
        return None
    return (
        f"SGLang laid weights out anew when it had loaded them, and cannot undo that: {_listed(after)}. "
        "Restart the server with the new weights, or with a quantisation or backend that keeps their layout"
    )


def check_dtypes(recording: Recording, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raises WeightsMismatch where a quantised parameter would be filled from numbers of more bits, which
    need a scale: SGLang quantises when it starts, and not again."""
    wrong = []
    for name, written in recording.parameters.items():
        dtype = parameters[name].dtype
        wide = [each for each in written.dtypes if each.is_floating_point and each.itemsize > 1]
        if dtype.itemsize == 1 and wide:
            came = ", ".join(sorted(written.sources))
            wrong.append(f"{name} is {_short(dtype)}, {came} {_short(wide[0])}")
    if wrong:
        raise WeightsMismatch(f"these must be quantised before they are sent: {_listed(wrong)}")


def _layouts(parameters: Mapping[str, torch.Tensor]) -> dict[str, Layout]:
    return {name: layout_of(tensor) for name, tensor in parameters.items()}


def _text(layout: Layout) -> str:
    shape, strides, dtype = layout
    return f"{_short(dtype)}{list(shape)} with strides {list(strides)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(told: Sequence[str]) -> str:
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return "; ".join(told[:_SHOWN]) + more
