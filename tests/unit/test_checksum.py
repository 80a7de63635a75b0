"""The digest is what its definition says, wherever the bytes lie, and changes with a bit, and with words that
change places (at random: it is linear, and some damage of many bits cancels out)."""

from __future__ import annotations

import random
import struct

import pytest
import torch

from ckpt_engine.checksum import COLUMNS, checksum, digest_of

SEED = 20261128
ROW = 8 * COLUMNS
SIZES = [0, 1, 7, 8, 9, ROW - 1, ROW, ROW + 1, 33 * ROW, 70 * ROW + 5, 1_000_003]


def by_definition(data: bytes) -> bytes:
    data += bytes(-len(data) % ROW)
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    where = sum(0x9E3779B1 * (i // COLUMNS + 1) * word for i, word in enumerate(words))
    where += sum((i % COLUMNS + 1) * word for i, word in enumerate(words))
    return struct.pack(">QQ", sum(words) % 2**64, where % 2**64)


def random_bytes(nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("nbytes", SIZES)
def test_it_is_what_its_definition_says(nbytes: int) -> None:
    data = random_bytes(nbytes)
    assert digest_of(checksum(data)) == by_definition(bytes(data.tolist()))


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_it_does_not_matter_where_the_bytes_lie(shift: int) -> None:
    data = random_bytes(70 * ROW + 5)
    room = torch.zeros(data.numel() + 64, dtype=torch.uint8)
    room[shift : shift + data.numel()] = data
    assert digest_of(checksum(room[shift : shift + data.numel()])) == digest_of(checksum(data))


def test_a_flipped_bit_and_a_misplaced_word_change_it() -> None:
    chance = random.Random(SEED)
    data = random_bytes(40 * ROW + 100)
    right = digest_of(checksum(data))
    for _ in range(200):
        byte, bit = chance.randrange(data.numel()), chance.randrange(8)
        data[byte] ^= 1 << bit
        assert digest_of(checksum(data)) != right, (byte, bit)
        data[byte] ^= 1 << bit
    words = data[: 40 * ROW].view(torch.int64)
    for _ in range(200):
        one, other = chance.sample(range(words.numel()), 2)
        pair = [one, other]
        words[pair] = words[pair[::-1]]
        assert digest_of(checksum(data)) != right, pair
        words[pair] = words[pair[::-1]]
    assert digest_of(checksum(data)) == right
