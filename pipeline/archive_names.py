"""Names of what an archive consists of, and what a listing of them says: segments (`archive`), range diffs (`ranges`).

    CHAIN/GENERATION/archive/SHARD/FIRST-LAST.seg
    CHAIN/GENERATION/ranges/SHARD/FIRST-LAST.PIECE-PIECES.rng

Generations in hex, heights with 12 digits, both inclusive; pieces count from 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

_SEGMENT = re.compile(r"(.+)/([0-9a-f]{32})/archive/(\d+)/(\d{12,})-(\d{12,})\.seg")
_PIECE = re.compile(r"(.+)/([0-9a-f]{32})/ranges/(\d+)/(\d{12,})-(\d{12,})\.(\d+)-(\d+)\.rng")


class _Span(NamedTuple):
    chain_id: str
    generation: bytes
    shard: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{self.first:012d}-{self.last:012d}"


class SegmentName(_Span):
    """``first`` and ``last`` are heights, both inclusive."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{archive_prefix(*self[:3])}{self.file}.seg"


class RangeName(_Span):
    """``first`` and ``last`` are heights, both inclusive: `(first - 1, last]`."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{ranges_prefix(*self[:3])}{self.file}"

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


def archive_prefix(chain_id: str, generation: bytes, shard: int) -> str:
    return f"{chain_id}/{generation.hex()}/archive/{shard}/"


def ranges_prefix(chain_id: str, generation: bytes, shard: int) -> str:
    return f"{chain_id}/{generation.hex()}/ranges/{shard}/"


def parse_segment_name(name: str) -> SegmentName | None:
    """The inverse of `str`; None for an object that is no segment."""
    match = _SEGMENT.fullmatch(name)
    if match is None:
        return None
    parsed = SegmentName(*_span(match))
    return parsed if str(parsed) == name and parsed.first <= parsed.last else None


def parse_piece_name(name: str) -> PieceName | None:
    """The inverse of `str`; None for an object that is no piece of a range diff."""
    match = _PIECE.fullmatch(name)
    if match is None:
        return None
    parsed = PieceName(RangeName(*_span(match)), int(match[6]), int(match[7]))
    is_sound = parsed.of.first <= parsed.of.last and 1 <= parsed.number <= parsed.total
    return parsed if str(parsed) == name and is_sound else None


def _span(match: re.Match[str]) -> _Span:
    return _Span(match[1], bytes.fromhex(match[2]), int(match[3]), int(match[4]), int(match[5]))


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
