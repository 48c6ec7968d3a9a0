"""The object store as a dict: the model that the others are tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

from pipeline.objects.base import (
    ObjectInfo,
    already_there,
    check_name,
    check_range,
    folder_of,
    folders_of,
    in_the_way,
    not_found,
)


class MemoryObjects:
    """Keeps the promises of `ObjectStore` within one process; threads may share it."""

    def __init__(self, now_s: Callable[[], float] = lambda: 0.0) -> None:
        """``now_s``: the store's own clock."""
        self._now_s = now_s
        self._modified_s: dict[str, float] = {}
        self._objects: dict[str, bytes] = {}
        self._lock = Lock()

    def get(self, name: str) -> bytes:
        data = self._objects.get(check_name(name))
        if data is None:
            raise not_found(name, "memory")
        return data

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        return self.get(name)[start:stop]

    def size(self, name: str) -> int:
        return len(self.get(name))

    def modified_s(self, name: str) -> float:
        self.get(name)
        return self._modified_s[name]

    def put_new(self, name: str, data: bytes) -> None:
        check_name(name)
        with self._lock:
            if name in self._objects:
                raise already_there(name, "memory")
            folders = {folder for other in self._objects for folder in folders_of(other)}
            if name in folders or any(folder in self._objects for folder in folders_of(name)):
                raise in_the_way(name, "memory")
            self._modified_s[name] = self._now_s()
            self._objects[name] = bytes(data)

    def put_file_new(self, name: str, path: Path) -> None:
        self.put_new(check_name(name), path.read_bytes())

    def fetch_to(self, name: str, path: Path) -> None:
        path.write_bytes(self.get(name))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder_of(prefix)
        found = sorted((name, data) for name, data in self._objects.copy().items() if name.startswith(prefix))
        return iter([ObjectInfo(name, len(data)) for name, data in found])

    def delete(self, name: str) -> None:
        self._objects.pop(check_name(name), None)
