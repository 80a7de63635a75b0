"""What a client lets an update leave out, behind each handle: SGLang drops fields of the request that it does
not know, and its own handler hands only the one handle on to our worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from ckpt_engine.errors import ConfigError

MARK = "#ckpt_engine_options="


class Options(NamedTuple):
    """`partial`, `ignored`: as of `completeness.Rules`."""

    partial: bool = False
    ignored: tuple[str, ...] = ()


def with_options(handle: str, partial: bool, ignored: Sequence[str]) -> str:
    """The handle as it is where nothing may be left out."""
    if not (partial or ignored):
        return handle
    return handle + MARK + json.dumps({"partial": partial, "ignored": list(ignored)})


def split_options(handle: str) -> tuple[str, str]:
    """The handle, and the options' text behind it."""
    handle, _, text = handle.partition(MARK)
    return handle, text


def parse_options(text: str) -> Options:
    """Raises ConfigError where `split_options` found no options."""
    try:
        options = json.loads(text or "{}")
        return Options(bool(options.get("partial", False)), tuple(map(str, options.get("ignored", ()))))
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ConfigError(f"{MARK[1:]}{text!r}: {error}") from None
