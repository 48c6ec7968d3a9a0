"""Object stores by URL: where snapshots and archives go."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import UsageError
from pipeline.objects.base import AlreadyThere, ObjectInfo, ObjectStore
from pipeline.objects.local import LocalObjects
from pipeline.objects.memory import MemoryObjects

__all__ = ["AlreadyThere", "LocalObjects", "MemoryObjects", "ObjectInfo", "ObjectStore", "open_objects"]

_memories: dict[str, MemoryObjects] = {}
"""Named memory stores live as long as the process, so that its parts can share one."""


def open_objects(url: str) -> ObjectStore:
    """``file:///path`` or ``memory://name`` (``memory://`` alone: a new one each time). Raises UsageError."""
    parts = urlsplit(url)
    name = unquote(parts.netloc + parts.path)
    if parts.query or parts.fragment:
        raise UsageError(f"object store {url!r} has a query or fragment, which means nothing here")
    match parts.scheme:
        case "memory":
            return _memories.setdefault(name, MemoryObjects()) if name else MemoryObjects()
        case "file" if parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            return LocalObjects(Path(unquote(parts.path)))
        case "file":
            raise UsageError(f"object store {url!r} names no absolute path", way_out="write file:///path")
        case _:
            raise UsageError(
                f"object store {url!r} is of a kind that this version does not know",
                way_out="this version keeps objects in file:///path",
            )
