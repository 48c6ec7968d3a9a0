"""What an object store promises, in words: the seam between stateferry and wherever snapshots and archives
lie.

Objects are immutable: a name gets its bytes once, whole or not at all. `put_new` is the only way to
publish, and the only place where two writers meet: exactly one of them wins, the other is told. Everything
that must exist as a unit (a manifest, a segment) is therefore one object, written after all that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.errors import ObjectMissing, StateferryError, UsageError

NAME_CHARACTERS_MAX = 512

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")


class AlreadyThere(StateferryError):
    """An object of that name exists. Whoever meant to write the same bytes compares; nobody overwrites."""


class ObjectInfo(NamedTuple):
    """One entry of a listing."""

    name: str
    size_bytes: int


class ObjectStore(Protocol):
    """A flat set of named, immutable byte strings.

    - A name is one or more segments of letters, digits and ``_.+=@-`` joined by ``/``, none beginning with
    a dot.
      Any other name raises UsageError, before anything is touched: names also come from manifests.
    - No object's name is a folder of another's: a store that keeps objects as files, or behind S3 does so, refuses
    to write ``a/b`` beside ``a`` (UsageError, or AlreadyThere behind S3).
    - A reader sees all of an object or nothing, also after a crash. What a call has put is durable when it
    returns.
    - What was listed may be gone when it is read, and what was put may be missing in a listing begun before.
    - No space, or no permission, raises DiskFull, behind a network ObjectsDenied. Any other trouble of the store
    itself raises OSError or ObjectsUnavailable.
    """

    def get(self, name: str) -> bytes:
        """The whole object. Raises ObjectMissing."""
        ...

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start <= at < stop``; fewer only where the object ends before ``stop``. Raises ObjectMissing."""
        ...

    def size(self, name: str) -> int:
        """The object's bytes. Raises ObjectMissing."""
        ...

    def modified_s(self, name: str) -> float:
        """When the object was put, by the store's own clock: Unix seconds. Raises ObjectMissing."""
        ...

    def put_new(self, name: str, data: bytes) -> None:
        """Create the object. Raises AlreadyThere and leaves the one that is there as it is."""
        ...

    def put_file_new(self, name: str, path: Path) -> None:
        """`put_new` with the content of a file, which must not change meanwhile and is left where it is."""
        ...

    def fetch_to(self, name: str, path: Path) -> None:
        """The object as a file, replacing what stands at ``path``; whole or not at all. Raises ObjectMissing."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose names begin with ``prefix`` (any string, not only whole segments), by name.

        Raises UsageError for a prefix that no name can have.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove the object. One that is not there is no error: a sweep may be repeated."""
        ...


def check_name(name: str) -> str:
    """The name, if it is one. Raises UsageError: absolute, with dots for segments, empty, too long, or
    strange."""
    if len(name) > NAME_CHARACTERS_MAX or not _NAME.fullmatch(name):
        raise UsageError(f"{name[:100]!r} cannot be the name of an object")
    return name


def check_range(start: int, stop: int) -> None:
    """A range is our own: it was computed from sizes."""
    assert 0 <= start <= stop, (start, stop)


def folder_of(prefix: str) -> str:
    """The folder that holds all names of a prefix; empty for the root. Raises UsageError as `check_name` does."""
    folder, slash, _ = prefix.rpartition("/")
    return check_name(folder) if slash else ""


def folders_of(name: str) -> Iterator[str]:
    """All folders that a name implies: `a`, then `a/b`, for `a/b/c`."""
    for at, character in enumerate(name):
        if character == "/":
            yield name[:at]


def not_found(name: str, where: object) -> ObjectMissing:
    return ObjectMissing(f"there is no object {name}", where=str(where))


def already_there(name: str, where: object) -> AlreadyThere:
    return AlreadyThere(f"object {name} exists", where=str(where))


def in_the_way(name: str, where: object) -> UsageError:
    return UsageError(
        f"object {name} and another one cannot both be: a name may not be another's folder", where=str(where)
    )
