"""`--verify`: the checksums that SGLang computes of its weights, compared with others that should be equal.

Of a checkpoint's own tensors there is nothing to compare them with: SGLang fuses and cuts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt_engine.errors import ConfigError, EngineRequestError
from ckpt_engine_sglang.client import SglangServer

_SHOWN = 3


def compare(
    servers: Sequence[SglangServer], file: Path | None, rank_count: int, unseen_count: int = 0
) -> str:
    """What was compared, in words.

    Args:
        rank_count: ranks of each server. Of several pipeline stages SGLang tells the first one's checksums.
        servers: the first one's checksums must be those of all others.
        file: holds checksums that must be the same; written where there is none.
        unseen_count: servers that were updated too, behind an address of another one: which of them answers
            there is not known.

    Raises:
        EngineRequestError: they differ, with the names of the parameters; or a server cannot tell them.
        ConfigError: the file cannot be read or written.
    """
    first = servers[0]
    expected = _sorted(first.checksums())
    for other in servers[1:]:
        _refuse_difference(_sorted(other.checksums()), expected, other.endpoint, first.endpoint)
    ranks = f"{len(expected)}{'' if len(expected) == rank_count else f' of {rank_count}'} ranks"
    compared = f"checksums of {ranks} of {len(servers)} servers compared"
    unseen = (
        f"; not verified: {unseen_count} of {unseen_count + len(servers)} servers, since they share an "
        "address and only one of them answers there: give each its own --endpoint, or {group} in --uds"
        if unseen_count
        else ""
    )
    if file is not None and file.exists():
        _refuse_difference(expected, _read(file), first.endpoint, str(file))
        return f"{compared}, and with {file}{unseen}"
    if file is not None:
        try:
            file.write_text(json.dumps(expected, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--checksums-file {file}: {error.strerror or error}") from None
        return f"{compared}, and written to {file}{unseen}"
    if len(servers) == 1:
        alone = "one address" if unseen_count else "one server"
        return f"nothing to verify: there is {alone}, and no --checksums-file to compare it with{unseen}"
    return compared + unseen


def _sorted(ranks: Sequence[Any]) -> list[Any]:
    """In the order of the ranks, which SGLang does not promise."""
    return sorted(ranks, key=lambda rank: json.dumps(rank["parallelism_info"], sort_keys=True))


def _read(file: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--checksums-file {file}: {error}") from None


def _refuse_difference(found: Any, expected: Any, where: str, other: str) -> None:  # noqa: ANN401 - JSON
    if found != expected:
        raise EngineRequestError(
            f"the weights of {where} are not those of {other}: {_difference(found, expected)}"
        )


def _difference(found: Any, expected: Any) -> str:  # noqa: ANN401 - JSON
    if not (isinstance(expected, list) and len(expected) == len(found)):
        return "not as many ranks"
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not (isinstance(other, dict) and isinstance(other.get("checksums"), dict)):
            return "no checksums there"
        a, b = one["checksums"], other["checksums"]
        names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            return f"on rank {rank} {', '.join(names[:_SHOWN])}{more}"
    return "their ranks are laid out differently"
