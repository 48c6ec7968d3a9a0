"""The object store as a directory: an object is a file, its name the path below the root.

A file becomes an object by a hard link: the bytes are written to a temporary file in the same folder and
synced, the link gives them their name (and fails if the name is taken), the folder is synced, the temporary
name goes. A crash in between leaves at most a file whose name begins with a dot, which no listing shows and
which may be removed.

The root may lie on a disk that several machines mount, as long as its links are atomic (NFS is, FAT is not).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import NO_ROOM, DiskFull
from pipeline.objects.base import (
    ObjectInfo,
    already_there,
    check_name,
    check_range,
    folder_of,
    in_the_way,
    not_found,
)
from pipeline.objects.files import DRAFT_PREFIX, sync, temporary_in, written_whole


class Draft(NamedTuple):
    """A file that is no object yet."""

    path: Path
    size_bytes: int
    modified_s: float


_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalObjects:
    """Keeps the promises of `ObjectStore` in a directory, which is made when the first object is put."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def get(self, name: str) -> bytes:
        with self._reading(name) as path:
            return path.read_bytes()

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        with self._reading(name) as path, path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified_s(self, name: str) -> float:
        return self._stat(name).st_mtime

    def put_new(self, name: str, data: bytes) -> None:
        self._put_new(name, lambda temporary: temporary.write_bytes(data))

    def put_file_new(self, name: str, path: Path) -> None:
        self._put_new(name, lambda temporary: shutil.copyfile(path, temporary))

    def fetch_to(self, name: str, path: Path) -> None:
        with self._reading(name) as source, written_whole(path) as draft:
            shutil.copyfile(source, draft)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        top = self._root / folder_of(prefix)
        found: list[ObjectInfo] = []
        with _disk_errors(top):
            for parent, folders, files in os.walk(top, onerror=_raise_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for file in files:
                    path = Path(parent, file)
                    name = path.relative_to(self._root).as_posix()
                    if not file.startswith(".") and name.startswith(prefix):
                        with suppress(FileNotFoundError):  # deleted since the folder was read
                            found.append(ObjectInfo(name, path.stat().st_size))
        return iter(sorted(found))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with _disk_errors(path), suppress(*_NOT_THERE):
            if not path.is_dir():
                path.unlink()
                sync(path.parent)

    def drafts(self) -> Iterator[Draft]:
        """What writers have not finished, or left when they were killed."""
        for path in self._root.rglob(f"{DRAFT_PREFIX}*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield Draft(path, found.st_size, found.st_mtime)

    def _stat(self, name: str) -> os.stat_result:
        with self._reading(name) as path:
            if path.is_dir():
                raise not_found(name, self._root)
            return path.stat()

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        try:
            with _disk_errors(path):
                yield path
        except _NOT_THERE as error:
            if error.filename is None or Path(os.fsdecode(error.filename)) == path:
                raise not_found(name, self._root) from None
            raise

    def _put_new(self, name: str, write: Callable[[Path], object]) -> None:
        path = self._path(name)
        with _disk_errors(path):
            try:
                _make_folder(path.parent)
            except (FileExistsError, NotADirectoryError):
                raise in_the_way(name, self._root) from None
            with temporary_in(path.parent) as temporary:
                write(temporary)
                sync(temporary)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    if path.is_dir():
                        raise in_the_way(name, self._root) from None
                    raise already_there(name, self._root) from None
                sync(path.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durable: a synced file in a folder that is lost is lost."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
        sync(folder.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(
                f"the object store cannot be used: {error.strerror}",
                where=str(path),
                way_out="free space, or give this user permission, and try again",
            ) from error
        raise


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, _NOT_THERE):
        raise error
