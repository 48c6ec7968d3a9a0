"""Holding leases in an object store while something is done there (`pipeline.leases`).

A thread renews what is held. One that cannot be renewed is let go of: what a lease keeps from being swept saves work,
and nothing is wrong without it (publishers look again at what they put, restores plan again).
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pipeline.errors import DiskFull, NotFound, ObjectsDenied, ObjectsUnavailable, StateferryError
from pipeline.leases import (
    LEASE_S,
    RENEW_S,
    Kind,
    Lease,
    LeaseName,
    Names,
    decode_lease,
    encode_lease,
    parse_lease_name,
)
from pipeline.objects import AlreadyThere, ObjectStore
from topology import logs

log = logs.get()

_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as whoever holds or sweeps sees it: ``steady_s`` never goes back, ``now_s`` may."""

    now_s: Callable[[], float] = time.time
    steady_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()


class Holding:
    """One lease, from `begin` to `end`.

    * There is always at least one object of it: the next one is put before the last is deleted.
    """

    def __init__(self, objects: ObjectStore, chain_id: str, kind: Kind, lease: Lease, clock: Clock = CLOCK) -> None:
        self._objects = objects
        self._chain_id = chain_id
        self._kind = kind
        self._lease = lease
        self._data = encode_lease(lease)
        self._clock = clock
        self._holder = secrets.token_bytes(8)
        self._name = ""

    def renew(self) -> None:
        """Begin, or go on. Raises what the store raises."""
        ends_s = self._clock.now_s() + (self._lease.lasts_s or LEASE_S)
        name = str(LeaseName(self._chain_id, self._kind, self._holder, max(0, math.ceil(ends_s))))
        if name != self._name:
            with suppress(AlreadyThere):  # a clock that went back, and came by again
                self._objects.put_new(name, self._data)
            self._drop()
            self._name = name

    def end(self) -> None:
        """What cannot be deleted expires."""
        with suppress(StateferryError, OSError):
            self._drop()
            self._name = ""

    def _drop(self) -> None:
        if self._name:
            self._objects.delete(self._name)


@contextmanager
def held(
    objects: ObjectStore, chain_id: str, kind: Kind, names: Iterable[str], *, clock: Clock = CLOCK
) -> Iterator[None]:
    """Hold a lease about these names, renewed. Where nothing may be written, or there is no room, nothing is held."""
    holding, ended = Holding(objects, chain_id, kind, Lease(names=tuple(names)), clock), threading.Event()

    def renew() -> None:
        try:
            holding.renew()
        except (DiskFull, ObjectsDenied, ObjectsUnavailable, OSError) as error:
            log.warning("lease_not_held", kind=kind.value, chain=chain_id, message=str(error))

    def keep() -> None:
        while not ended.wait(RENEW_S):
            renew()

    renew()
    thread = threading.Thread(target=keep, name=f"{kind.value} lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        holding.end()


def listed_leases(objects: ObjectStore, chain_id: str) -> list[LeaseName]:
    """All that are there, expired or not."""
    names = (parse_lease_name(info.name) for info in objects.list(f"{chain_id}/leases/"))
    return [name for name in names if name is not None]


def read_leases(objects: ObjectStore, names: Iterable[LeaseName]) -> Iterator[tuple[LeaseName, Lease]]:
    """What they say; those that ended meanwhile are left out. Raises LeaseCorrupt."""
    for name in names:
        with suppress(NotFound):
            yield name, decode_lease(objects.get(str(name)), str(name))


def wait_for_sweeps(objects: ObjectStore, chain_id: str, wanted: Iterable[str], clock: Clock = CLOCK) -> None:
    """Until no sweep is under way that may delete one of these names. One that was killed counts until it would have
    ended, from when it was first seen here."""
    wanted = list(wanted)
    seen_s: dict[LeaseName, float] = {}
    while True:
        now_s, waiting = clock.steady_s(), False
        marks = [name for name in listed_leases(objects, chain_id) if name.kind is Kind.MARK]
        for name, lease in read_leases(objects, marks):
            swept = Names(lease.names)
            if any(one in swept for one in wanted):
                waiting |= now_s - seen_s.setdefault(name, now_s) <= lease.lasts_s
        if not waiting:
            return
        clock.sleep(_LOOK_S)
