"""Object stores by URL: where snapshots and archives go."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import UsageError
from pipeline.objects.base import AlreadyThere, ObjectInfo, ObjectStore, check_name
from pipeline.objects.local import LocalObjects
from pipeline.objects.memory import MemoryObjects
from pipeline.objects.s3 import S3Objects

__all__ = ["AlreadyThere", "LocalObjects", "MemoryObjects", "ObjectInfo", "ObjectStore", "S3Objects", "open_objects"]

_memories: dict[str, MemoryObjects] = {}
"""Named memory stores live as long as the process, so that its parts can share one."""


def open_objects(url: str) -> ObjectStore:
    """``file:///path``, ``s3://bucket/prefix``, or ``memory://name`` (``memory://`` alone: a new one each time).

    Raises UsageError.
    """
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
        case "s3" if parts.hostname:
            prefix = unquote(parts.path).strip("/")
            return S3Objects(parts.netloc, check_name(prefix) if prefix else "")
        case "s3":
            raise UsageError(f"object store {url!r} names no bucket", way_out="write s3://bucket/prefix")
        case _:
            raise UsageError(
                f"object store {url!r} is of a kind that this version does not know",
                way_out="this version keeps objects in file:///path or s3://bucket/prefix",
            )
