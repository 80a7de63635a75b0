"""The digest is what its definition says, wherever the bytes lie, and changes with damage that cancels out in
sums: pairs of flips, words and blocks that change places, stuck bits, runs of zeros that move."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable

import pytest
import torch

from ckpt_engine.checksum import COLUMNS, checksum, digest_of, on_device
from ckpt_engine.errors import ConfigError

SEED = 20261128
ROW = 8 * COLUMNS
MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15
SIZES = [0, 1, 7, 8, 9, ROW - 1, ROW, ROW + 1, 33 * ROW, 70 * ROW + 5, 1_000_003]
ROWS = 40


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def by_definition(data: bytes) -> bytes:
    data += bytes(ROW - len(data) % ROW)
    keys = [mix((column + 1) * STEP & MASK) | 1 for column in range(COLUMNS)]
    plain = weighted = 0
    for number, begin in enumerate(range(0, len(data), ROW)):
        words = [word ^ (word >> 32) for word in struct.unpack(f"<{COLUMNS}Q", data[begin : begin + ROW])]
        key = (number + 1) * STEP
        plain += mix((sum(words) + key) & MASK)
        weighted += mix((sum(key * word for key, word in zip(keys, words, strict=True)) + key) & MASK)
    return struct.pack(">QQ", plain & MASK, weighted & MASK)


def random_bytes(nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def structured() -> dict[str, torch.Tensor]:
    """Words of bytes that damage cancels out in most easily, ROWS rows of each kind."""
    count = ROWS * COLUMNS
    return {
        "random": random_bytes(8 * count).view(torch.int64),
        "zeros": torch.zeros(count, dtype=torch.int64),
        "equal": torch.full((count,), 0x3F803F803F803F80),
        "small": torch.arange(count) % 7,
    }


KINDS = sorted(structured())


def digest(words: torch.Tensor) -> bytes:
    return digest_of(checksum(words.reshape(-1).view(torch.uint8)))


@pytest.mark.parametrize("nbytes", SIZES)
def test_it_is_what_its_definition_says(nbytes: int) -> None:
    data = random_bytes(nbytes)
    expected = by_definition(bytes(data.tolist()))
    assert digest_of(checksum(data)) == expected
    assert digest_of(on_device(data)) == expected


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("compute", [checksum, on_device], ids=["host", "device"])
def test_it_does_not_matter_where_the_bytes_lie(
    shift: int, compute: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    data = random_bytes(70 * ROW + 5)
    room = torch.zeros(data.numel() + 64, dtype=torch.uint8)
    room[shift : shift + data.numel()] = data
    assert digest_of(compute(room[shift : shift + data.numel()])) == digest_of(checksum(data))


def test_any_flipped_bit_changes_it() -> None:
    chance = random.Random(SEED)
    data = random_bytes(ROWS * ROW + 100)
    right = digest_of(checksum(data))
    for _ in range(300):
        byte, bit = chance.randrange(data.numel()), chance.randrange(8)
        data[byte] ^= 1 << bit
        assert digest_of(checksum(data)) != right, (byte, bit)
        data[byte] ^= 1 << bit


@pytest.mark.parametrize("kind", KINDS)
def test_two_flips_of_the_same_bit_do_not_cancel_out(kind: str) -> None:
    chance = random.Random(SEED)
    words = structured()[kind]
    right = digest(words)
    for bit in range(64):
        flip = 1 << bit if bit < 63 else -(1 << 63)
        column, row = chance.randrange(COLUMNS - 1), chance.randrange(ROWS - 1)
        one = row * COLUMNS + column
        others = {
            "in a row": one + 1,
            "in a column": one + COLUMNS,
            "anywhere": chance.choice([place for place in range(words.numel()) if place != one]),
        }
        for how, other in others.items():
            pair = torch.tensor([one, other])
            words[pair] ^= flip
            assert digest(words) != right, (bit, how, one, other)
            words[pair] ^= flip


@pytest.mark.parametrize("kind", KINDS)
def test_stuck_bits_do_not_cancel_out(kind: str) -> None:
    words = structured()[kind]
    right = digest(words)
    for bit in range(64):
        flip = 1 << bit if bit < 63 else -(1 << 63)
        for stride in (1, 2, 8, COLUMNS // 2, COLUMNS):
            damaged = words.clone()
            damaged[::stride] ^= flip
            assert digest(damaged) != right, (bit, stride)
        # The corners of a rectangle: what sums of rows and of columns do not see.
        damaged = words.clone().view(ROWS, COLUMNS)
        damaged[3:9:2, 10:200:10] ^= flip
        assert digest(damaged) != right, bit


@pytest.mark.parametrize("kind", ["random", "small"])
def test_words_that_change_places_change_it(kind: str) -> None:
    chance = random.Random(SEED)
    words = structured()[kind]
    right = digest(words)
    for _ in range(300):
        one, other = chance.sample(range(words.numel()), 2)
        if words[one] == words[other]:
            continue
        damaged = words.clone()
        damaged[one], damaged[other] = words[other], words[one]
        assert digest(damaged) != right, (one, other)


@pytest.mark.parametrize("size", [1, 8, 512, COLUMNS, 3 * COLUMNS])
def test_blocks_that_change_places_change_it(size: int) -> None:
    chance = random.Random(SEED)
    words = structured()["random"]
    words[: 8 * COLUMNS] = words[8 * COLUMNS : 9 * COLUMNS].repeat(8)  # equal rows but for their places
    words[COLUMNS : 2 * COLUMNS] = words[:COLUMNS].roll(1)  # a row of the same sum as another
    right = digest(words)
    for _ in range(50):
        one, other = (chance.randrange(words.numel() // size) * size for _ in range(2))
        if torch.equal(words[one : one + size], words[other : other + size]):
            continue
        damaged = words.clone()
        damaged[one : one + size] = words[other : other + size]
        damaged[other : other + size] = words[one : one + size]
        assert digest(damaged) != right, (one, other)
    rolled = words.clone()
    rolled[: 2 * COLUMNS] = torch.cat([words[COLUMNS : 2 * COLUMNS], words[:COLUMNS]])
    assert digest(rolled) != right


def test_zeros_in_place_of_words_and_runs_that_move_change_it() -> None:
    words = structured()["random"]
    seen = {digest(words)}
    for begin in range(0, 4 * COLUMNS, 256):
        damaged = words.clone()
        damaged[begin : begin + 512] = 0
        seen.add(digest(damaged))
    for begin in range(0, 4 * COLUMNS, 256):
        sparse = torch.zeros_like(words)
        sparse[begin : begin + 512] = words[:512]
        seen.add(digest(sparse))
    assert len(seen) == 1 + 16 + 16
    assert len({digest_of(checksum(torch.zeros(rows * ROW, dtype=torch.uint8))) for rows in range(50)}) == 50


def test_a_big_endian_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(ConfigError, match="little-endian"):
        checksum(random_bytes(8))
