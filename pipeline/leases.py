"""Leases: who is at work in an object store, and on what.

Whoever publishes or restores says so before it begins, so that nothing it needs is swept meanwhile; whoever sweeps says
what, before it waits. Objects are never changed, so a lease is an object with its end in its name, and it is renewed by
putting another one and deleting the one before:

    CHAIN/leases/KIND-HOLDER-EXPIRES.json      HOLDER 16 hex digits, EXPIRES Unix seconds with 12 digits

It is a canonical document (`pipeline.canonical`) with these fields:

    lasts_s     how long from its beginning it may last in all; 0: as long as it is renewed
    names       objects that it is about; a name that ends in / stands for all below it

An **intent** is a publisher's, about what it puts, and a squasher's, about what it reads too; a **pin** a restore's,
about what it reads; a **mark** a sweep's, about what it is going to delete.

Clocks may differ, and go back. So a lease is dead only for who saw the same object twice, a grace apart by a clock that
never goes back, and finds it expired by then: a living holder has renewed it in between, whatever its clock says.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.canonical import sealed, unsealed
from pipeline.errors import LeaseCorrupt

LEASE_S = 600.0
"""From one renewal to the end: a process that stands still for less keeps its lease."""
RENEW_S = 30.0
"""Between renewals; a fourth of the shortest grace that is safe with clocks that differ."""
GRACE_S = 120.0
"""What a sweep waits between its mark and its deletes."""

_NAME = re.compile(r"(.+)/leases/(intent|pin|mark)-([0-9a-f]{16})-(\d{12})\.json")


class Kind(enum.Enum):
    INTENT = "intent"
    PIN = "pin"
    MARK = "mark"


class LeaseName(NamedTuple):
    """What a lease's name says."""

    chain_id: str
    kind: Kind
    holder: bytes
    expires_s: int

    def __str__(self) -> str:
        return f"{self.chain_id}/leases/{self.kind.value}-{self.holder.hex()}-{self.expires_s:012d}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a lease says: ``names`` as in its document, ``lasts_s`` 0 if it is renewed."""

    names: tuple[str, ...]
    lasts_s: int = 0


class Names:
    """A set of names, and of folders with all below them."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        given = list(names)
        self._names = {name for name in given if not name.endswith("/")}
        self._folders = {name for name in given if name.endswith("/")}

    def __contains__(self, name: str) -> bool:
        return name in self._names or any(folder in self._folders for folder in _folders(name))


def _folders(name: str) -> Iterator[str]:
    for at, character in enumerate(name):
        if character == "/":
            yield name[: at + 1]


def parse_lease_name(name: str) -> LeaseName | None:
    """The inverse of ``str`` of a `LeaseName`; None for an object that is no lease."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    chain_id, kind, holder, expires_s = match.groups()
    return LeaseName(chain_id, Kind(kind), bytes.fromhex(holder), int(expires_s))


def encode_lease(lease: Lease) -> bytes:
    return sealed({"lasts_s": lease.lasts_s, "names": sorted(lease.names)})


def decode_lease(data: bytes, where: str) -> Lease:
    """The inverse of `encode_lease`. Raises LeaseCorrupt."""
    try:
        fields = unsealed(data)
        lasts_s, names = fields["lasts_s"], fields["names"]
        if fields.keys() != {"lasts_s", "names"} or not isinstance(lasts_s, int) or not isinstance(names, list):
            raise ValueError("has other fields")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names what is no name")
    except (ValueError, KeyError) as error:
        raise LeaseCorrupt(
            f"a lease cannot be read, so what it keeps is not known: {error}",
            where=where,
            way_out="delete it if whoever wrote it is gone, then try again",
        ) from error
    return Lease(names=tuple(names), lasts_s=lasts_s)


def dead(names: Sequence[LeaseName], before: Collection[LeaseName], now_s: float) -> list[LeaseName]:
    """Those of ``names`` that nobody holds any more. ``before``: what was listed a grace ago."""
    return [name for name in names if name in before and name.expires_s < now_s]
