"""Parts: a state in sorted files, each hashed as it is written.

A part is an SST file of a contiguous run of storage keys, with its digest and its **partials**: the LtHash vectors of
what it holds. Partials of all parts sum up to the vectors of the state, so whoever writes parts audits its store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from pipeline.commitment import lthash
from pipeline.errors import StoreCorrupt
from pipeline.state import key_group
from pipeline.stores.rocksdb import named_errors
from pipeline.stores.sst import SortedFile
from pipeline.verify import Audited, audit, combine

PART_RAW_BYTES_MAX = 32 << 20
"""Keys and values in one part before compression: a fetch that fails costs little, a state of 12 GB has 400 parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a snapshot. Keys are storage keys, both inclusive; ``keys`` counts whole keys."""

    name: str
    size_bytes: int
    digest: bytes
    keys: int
    first_key: bytes
    last_key: bytes
    partials: Mapping[int, bytes]  # vectors by table id

    @property
    def first_group(self) -> int:
        return key_group(self.first_key)

    @property
    def last_group(self) -> int:
        return key_group(self.last_key)


class WrittenPart(NamedTuple):
    part: Part
    path: Path


def write_parts(
    entries: Iterable[tuple[bytes, bytes]],
    folder: Path,
    *,
    first_number: int = 0,
    raw_bytes_max: int = PART_RAW_BYTES_MAX,
) -> Iterator[WrittenPart]:
    """Ascending (storage key, stored bytes) as parts in a folder, numbered and hashed as they are written.

    Raises StoreCorrupt (out of order, malformed), DiskFull.
    """
    iterator = iter(entries)
    last_key = b""
    for number in itertools.count(first_number):
        first = next(iterator, None)
        if first is None:
            return
        if first[0] <= last_key:
            raise StoreCorrupt(f"storage key {first[0].hex()} does not ascend")
        draft = folder / f"part-{number:05d}.new"
        writer = _PartWriter(draft, raw_bytes_max)
        with named_errors(draft):
            audited = audit(writer.through(itertools.chain((first,), iterator)))
        last_key = writer.last_key
        size = writer.file.finish()
        digest = digest_file(draft)
        part = Part(
            name=f"part-{number:05d}-{digest[:8].hex()}.sst",
            size_bytes=size,
            digest=digest,
            keys=audited.keys,
            first_key=first[0],
            last_key=last_key,
            partials={table_id: vector for table_id, vector in audited.vectors.items() if vector != lthash.ZERO},
        )
        path = folder / part.name
        draft.rename(path)
        yield WrittenPart(part, path)


class _PartWriter:
    """Writes what passes through, up to the first storage key at which the part is full."""

    def __init__(self, path: Path, raw_bytes_max: int) -> None:
        self.file = SortedFile(path)
        self.last_key = b""
        self._left = raw_bytes_max

    def through(self, entries: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        put, left = self.file.put, self._left
        with named_errors(self.file.path):
            for entry in entries:
                key, value = entry
                put(key, value)
                self.last_key = key
                yield entry
                left -= len(key) + len(value)
                if left <= 0:
                    return


def digest_file(path: Path) -> bytes:
    """BLAKE3-256 of a file's bytes."""
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.digest()


def sum_parts(parts: Sequence[Part]) -> Audited:
    """What the parts hold in all, by their partials."""
    return combine(Audited(vectors=part.partials, keys=part.keys) for part in parts)
