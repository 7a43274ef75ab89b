"""Damage to the bytes of a file: cut, overwritten, repeated, moved, mixed with another file."""

import random
import struct
from collections.abc import Callable, Sequence

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
_FORMATS = ("<H", ">H", "<I", ">I", "<Q", ">Q")

Mutation = Callable[[random.Random, bytearray], None]


def mutate(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to three damages, in the beginning of the file as often as in all of it; `others` are files to mix in."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not damaged:
            break
        if others and rng.random() < 0.1:
            donor = rng.choice(others)
            damaged[_place(rng, damaged) :] = donor[rng.randrange(len(donor)) :]
        else:
            rng.choice(MUTATIONS)(rng, damaged)
    return bytes(damaged)


def _place(rng: random.Random, content: bytearray) -> int:
    reach = rng.choice((16, 64, 512, len(content)))
    return rng.randrange(min(reach, len(content)))


def _flip_bits(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.randint(1, 16)):
        content[_place(rng, content)] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, content: bytearray) -> None:
    content[_place(rng, content)] = rng.choice((*EXTREMES, rng.randrange(256)))


def _set_number(rng: random.Random, content: bytearray) -> None:
    """Write a number over the bytes at some place: large, tiny or a little off."""
    kind = rng.choice(_FORMATS)
    size = struct.calcsize(kind)
    start = _place(rng, content)
    if start + size > len(content):
        return
    (before,) = struct.unpack_from(kind, content, start)
    largest = 256**size - 1
    value = rng.choice((0, 1, before + 1, before - 1, 2 * before, largest, largest // 2, largest // 2 + 1, 20_000))
    struct.pack_into(kind, content, start, value & largest)


def _cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(len(content)) :]


def _remove(rng: random.Random, content: bytearray) -> None:
    start = _place(rng, content)
    del content[start : start + rng.randint(1, 100)]


def _insert(rng: random.Random, content: bytearray) -> None:
    start = _place(rng, content)
    content[start:start] = rng.randbytes(rng.randint(1, 40))


def _repeat(rng: random.Random, content: bytearray) -> None:
    start = _place(rng, content)
    content[start:start] = content[start : start + rng.randint(1, 400)] * rng.choice((1, 1, 1, 20))


def _move(rng: random.Random, content: bytearray) -> None:
    start, target, count = _place(rng, content), _place(rng, content), rng.randint(1, 80)
    content[target : target + count] = content[start : start + count]


def _fill(rng: random.Random, content: bytearray) -> None:
    start, count = _place(rng, content), rng.randint(1, 200)
    value = rng.choice(EXTREMES)
    content[start : start + count] = bytes([value]) * len(content[start : start + count])


MUTATIONS: tuple[Mutation, ...] = (
    *(_flip_bits, _flip_bits, _set_byte, _set_byte, _set_number, _set_number, _set_number),
    *(_cut, _remove, _insert, _repeat, _move, _fill),
)
