"""Names of range diffs and their pieces (`ranges`), and what a listing of them says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(r"(.+)/([0-9a-f]{32})/ranges/(\d+)/(\d{12,})-(\d{12,})\.(\d+)-(\d+)\.rng")


class RangeName(NamedTuple):
    """``first`` and ``last`` are heights, both inclusive: `(first - 1, last]`."""

    chain_id: str
    generation: bytes
    shard: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"{ranges_prefix(self.chain_id, self.generation, self.shard)}{self.first:012d}-{self.last:012d}"

    def pieces(self, total: int) -> list[PieceName]:
        return [PieceName(self, number, total) for number in range(1, total + 1)]


class PieceName(NamedTuple):
    """``number`` counts from 1 to ``total``."""

    of: RangeName
    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.of}.{self.number}-{self.total}.rng"


class RangeObject(NamedTuple):
    """A range diff as a listing shows it, all of its pieces there. ``sizes``: of each in bytes."""

    name: RangeName
    sizes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def pieces(self) -> list[PieceName]:
        return self.name.pieces(len(self.sizes))


def ranges_prefix(chain_id: str, generation: bytes, shard: int) -> str:
    return f"{chain_id}/{generation.hex()}/ranges/{shard}/"


def parse_piece_name(name: str) -> PieceName | None:
    """The inverse of `str`; None for an object that is no piece of a range diff."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    chain_id, generation, *numbers = match.groups()
    shard, first, last, number, total = map(int, numbers)
    parsed = PieceName(RangeName(chain_id, bytes.fromhex(generation), shard, first, last), number, total)
    return parsed if str(parsed) == name and first <= last and 1 <= number <= total else None


def whole_ranges(pieces: Iterable[tuple[PieceName, int]]) -> list[RangeObject]:
    """Of listed pieces and their sizes, the range diffs that have all of theirs, by name."""
    sizes: dict[tuple[RangeName, int], dict[int, int]] = defaultdict(dict)
    for piece, size_bytes in pieces:
        sizes[piece.of, piece.total][piece.number] = size_bytes
    found: dict[RangeName, RangeObject] = {}
    for (name, total), by_number in sorted(sizes.items()):
        if len(by_number) == total:
            found.setdefault(name, RangeObject(name, tuple(size for _, size in sorted(by_number.items()))))
    return list(found.values())
