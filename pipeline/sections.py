"""A file of sections: a table of what stands where, the sections without holes, a digest over everything.

Whoever wants one section reads the table, then that section: neither needs the rest. Only who reads all of it can
check the digest. Layout (little-endian):

    magic 4 B · version u16 · section count u16 · bytes in all u64                                   16 B
    per section: kind u16 · flags u16 (bit 0: a reader that does not know the kind must stop) ·
                 reserved u32 = 0 · offset u64 (from the start of the file) · length u64             24 B each
    the sections, one after another, in the order of the table, without holes
    BLAKE3-256 of everything before                                                                  32 B
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct

from blake3 import blake3

from pipeline.errors import CorruptInput, SegmentCorrupt, Unsupported

TABLE_BYTES_MAX = 16 + 64 * 24
"""A table of up to 64 sections: what a reader that wants one section asks for first."""

_DIGEST_BYTES = 32
_PIECE_BYTES = 1 << 20
_REQUIRED = 1

_HEAD = Struct("<4sHHQ")
assert _HEAD.size == 16
_SECTION = Struct("<HHIQQ")
assert _SECTION.size == 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One kind of file of sections. ``optional``: kinds that a reader may pass by, and a file may lack."""

    what: str
    magic: bytes
    version: int
    kinds: type[enum.IntEnum]
    optional: frozenset[int] = frozenset()
    corrupt: type[CorruptInput] = SegmentCorrupt  # what is raised for a damaged one

    def join(self, sections: Mapping[int, bytes]) -> bytes:
        """The file's bytes."""
        at = _HEAD.size + _SECTION.size * len(sections)
        table = []
        for kind, data in sections.items():
            table.append(_SECTION.pack(kind, 0 if kind in self.optional else _REQUIRED, 0, at, len(data)))
            at += len(data)
        head = _HEAD.pack(self.magic, self.version, len(sections), at + _DIGEST_BYTES)
        body = b"".join((head, *table, *sections.values()))
        return body + blake3(body).digest()

    def split(self, data: bytes) -> dict[int, tuple[int, int]]:
        """Where each known section of a whole file starts and stops. Raises SegmentCorrupt, Unsupported."""
        self._check_magic(data, len(data))
        if blake3(memoryview(data)[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
            raise self.corrupt(f"the digest of a {self.what} does not match its bytes")
        return self.places(data, len(data))

    def check_digest(self, read: Callable[[int, int], bytes], size_bytes: int) -> None:
        """The digest of a file that is read bit by bit: ``read(start, stop)``. Raises SegmentCorrupt."""
        self._check_magic(read(0, _HEAD.size), size_bytes)
        hasher, stop = blake3(), size_bytes - _DIGEST_BYTES
        for at in range(0, stop, _PIECE_BYTES):
            hasher.update(read(at, min(at + _PIECE_BYTES, stop)))
        if hasher.digest() != read(stop, size_bytes):
            raise self.corrupt(f"the digest of a {self.what} does not match its bytes")

    def places(self, head: bytes, size_bytes: int) -> dict[int, tuple[int, int]]:
        """The same from the file's first `TABLE_BYTES_MAX` bytes and its size; the digest is not checked."""
        self._check_magic(head, size_bytes)
        _, version, count, size = _HEAD.unpack_from(head)
        if version != self.version:
            raise Unsupported(
                f"a {self.what} of version {version}", way_out=f"this build reads version {self.version}: upgrade"
            )
        at, stop = _HEAD.size + count * _SECTION.size, size_bytes - _DIGEST_BYTES
        if size != size_bytes or at > stop or at > len(head):
            raise self.corrupt(f"a {self.what} says it has {size} bytes and {count} sections, and has {size_bytes}")
        known = {kind.value for kind in self.kinds}
        found: dict[int, tuple[int, int]] = {}
        for kind, flags, _, offset, length in _SECTION.iter_unpack(head[_HEAD.size : at]):
            if offset != at or length > stop - at or kind in found:
                raise self.corrupt(f"section {kind} of a {self.what} is out of place")
            at += length
            if kind in known:
                found[kind] = (offset, at)
            elif flags & _REQUIRED:
                raise Unsupported(f"a {self.what} with a section of kind {kind}", way_out="upgrade")
        if at != stop or known - self.optional - found.keys():
            raise self.corrupt(f"a {self.what} lacks a section, or has bytes in no section")
        return found

    def _check_magic(self, head: bytes, size_bytes: int) -> None:
        if size_bytes < _HEAD.size + _DIGEST_BYTES or len(head) < _HEAD.size or head[:4] != self.magic:
            raise self.corrupt(
                f"not a {self.what}: magic or size is wrong ({size_bytes} bytes, first {head[:8].hex()})"
            )
