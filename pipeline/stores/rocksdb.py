"""The store of every node: RocksDB through rocksdict, three column families, one write batch per group.

**fsync policy.** The write-ahead log is on and not synced per write. A process that is killed loses nothing: the
kernel has the bytes. After a power cut the store may be some batches older than the log it follows, never newer than
what it was told, and never torn between column families, as all three share one write-ahead log. The log decides, so
an older store simply reads on. `flush` syncs; snapshots and restores call it before they publish anything.

**Memory.** Memtables: state 2 x 24 MiB, undo 2 x 8 MiB, meta 2 x 1 MiB; one block cache of 32 MiB for all families:
100 MiB at most. Filters and indexes of open files come on top, some 2 bytes a key. Options are those measured in
`stateferry bench apply`: full bloom filters of 10 bits (a miss is answered without a disk read), hash index inside data
blocks, memtable bloom, no compression (values are hashes), dynamic levels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Checkpoint,
    DataBlockIndexType,
    DBCompressionType,
    IngestExternalFileOptions,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
)

from pipeline.errors import NO_ROOM, DiskFull, Locked, NotEmpty, StateferryError, StoreCorrupt, Unsupported
from pipeline.stores.base import FORMAT_KEY, FORMAT_VERSION, Batch

BLOCK_CACHE_BYTES = 32 << 20
_STATE_MEMTABLE_BYTES = 24 << 20
_UNDO_MEMTABLE_BYTES = 8 << 20
_META_MEMTABLE_BYTES = 1 << 20
MEMTABLES_BYTES_MAX = 2 * (_STATE_MEMTABLE_BYTES + _UNDO_MEMTABLE_BYTES + 2 * _META_MEMTABLE_BYTES)
"""One of each family that is written to, and one that is being flushed."""
_UNBORN = re.compile(
    r"LOCK|LOG.*|IDENTITY|rocksdict-config\.json|(MANIFEST|OPTIONS)-\d+|\d+\.(log|dbtmp)|OPTIONS-\d+\.dbtmp"
)
"""What RocksDB may have written before its first CURRENT."""
_FAMILIES = ("state", "undo", "meta")
_NO_ROOM = tuple(map(os.strerror, NO_ROOM))


def state_options(memtable_bytes: int = _STATE_MEMTABLE_BYTES, cache: Cache | None = None) -> Options:
    """How the state family is tuned; also the options of snapshot parts and of the baseline of `bench apply`."""
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    table.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    table.set_data_block_hash_ratio(0.75)
    table.set_block_size(4096)
    table.set_format_version(5)
    if cache is not None:
        table.set_block_cache(cache)
        # Filters and indexes stay with their open files: a filter is larger than a shard of a small cache, which would
        # then read it again for every lookup.
        table.set_cache_index_and_filter_blocks(False)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.none())
    options.set_write_buffer_size(memtable_bytes)
    options.set_max_write_buffer_number(2)
    options.set_memtable_whole_key_filtering(True)
    options.set_memtable_prefix_bloom_ratio(0.1)
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_max_background_jobs(2)
    options.set_max_open_files(256)
    options.set_max_total_wal_size(128 << 20)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1 << 20)
    return options


class named_errors:
    """rocksdict raises plain Exceptions with RocksDB's status text; here they get their names. A class, as a generator
    costs every lookup a microsecond more."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, StateferryError):
            named = _named(str(error), str(self._path))
            if named is not None:
                raise named from error


def _named(text: str, where: str) -> StateferryError | None:
    if any(words in text for words in _NO_ROOM):
        return DiskFull(f"the store cannot write: {text}", where=where, way_out="free some space, then start again")
    if "lock" in text.lower() and "IO error" in text:
        return Locked(
            "the store is open in another process", where=where, way_out="stop that worker, or ask it instead"
        )
    if "Corruption" in text or "checksum" in text.lower():
        return StoreCorrupt(
            f"the store is damaged: {text}", where=where, way_out="restore this data directory from a snapshot"
        )
    return None


def _once_through() -> ReadOptions:
    """For whoever reads much of a store, and each entry once."""
    options = ReadOptions()
    options.fill_cache(False)  # an audit must not push the working set out of the cache
    options.set_readahead_size(2 << 20)
    return options


class Memory(NamedTuple):
    """What RocksDB holds; its bounds are `MEMTABLES_BYTES_MAX` and `BLOCK_CACHE_BYTES`."""

    memtables_bytes: int
    block_cache_bytes: int


class RocksStore:
    """A `Store` in one directory."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Opens or creates. Raises Locked, DiskFull, StoreCorrupt, Unsupported (made by a newer version)."""
        self.path = path
        self._closed = False
        if not read_only:
            _clear_unborn(path)
        self._cache = Cache(BLOCK_CACHE_BYTES)
        families = {
            "default": state_options(_META_MEMTABLE_BYTES, self._cache),
            "state": state_options(_STATE_MEMTABLE_BYTES, self._cache),
            "undo": state_options(_UNDO_MEMTABLE_BYTES, self._cache),
            "meta": state_options(_META_MEMTABLE_BYTES, self._cache),
        }
        access = AccessType.read_only(False) if read_only else AccessType.read_write()
        with named_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._db = Rdict(str(path), families["default"], column_families=families, access_type=access)
            self._state = self._db.get_column_family("state")
            self._undo = self._db.get_column_family("undo")
            self._meta = self._db.get_column_family("meta")
            self._handles = {name: self._db.get_column_family_handle(name) for name in _FAMILIES}
        try:
            self._check_format(read_only=read_only)
        except BaseException:
            self.close()
            raise

    def _check_format(self, *, read_only: bool) -> None:
        held = self.get_meta(FORMAT_KEY)
        if held is None and not read_only:
            self.write(Batch(meta={FORMAT_KEY: str(FORMAT_VERSION).encode()}))
        elif held is not None and int(held) > FORMAT_VERSION:
            raise Unsupported(
                f"the data directory has format {int(held)}, this build reads up to {FORMAT_VERSION}",
                where=str(self.path),
                way_out="upgrade stateferry",
            )

    def memory(self) -> Memory:
        """What RocksDB holds now."""
        families = (self._db, self._state, self._undo, self._meta)
        return Memory(
            memtables_bytes=sum(family.property_int_value("rocksdb.size-all-mem-tables") or 0 for family in families),
            block_cache_bytes=self._cache.get_usage(),
        )

    def file_bytes(self) -> int:
        """What the files of the state hold; what is only in memory and the write-ahead log does not count."""
        with named_errors(self.path):
            size: int = self._state.property_int_value("rocksdb.total-sst-files-size") or 0
        return size

    def get(self, storage_keys: list[bytes]) -> list[bytes | None]:
        with named_errors(self.path):
            if len(storage_keys) == 1:  # a multi-get of one takes twice as long
                return [self._state.get(storage_keys[0])]
            stored: list[bytes | None] = self._state.get(storage_keys)
        return stored

    def get_undo(self, key: bytes) -> bytes | None:
        with named_errors(self.path):
            value: bytes | None = self._undo.get(key)
        return value

    def get_meta(self, key: bytes) -> bytes | None:
        with named_errors(self.path):
            value: bytes | None = self._meta.get(key)
        return value

    def write(self, batch: Batch) -> None:
        write = WriteBatch(raw_mode=True)
        families = (("state", batch.state), ("undo", batch.undo), ("meta", batch.meta))
        for name, changes in families:
            write.set_default_column_family(self._handles[name])
            put, delete = write.put, write.delete
            for key in sorted(changes):  # a memtable takes ascending keys faster
                value = changes[key]
                if value is None:
                    delete(key)
                else:
                    put(key, value)
        with named_errors(self.path):
            self._db.write(write)

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        snapshot = self._state.snapshot()
        options = _once_through()
        if stop is not None:
            options.set_iterate_upper_bound(stop)
        iterator = snapshot.iter(options)
        iterator.seek(start)
        return self._walk(iterator, snapshot, options, stop)

    def _walk(self, iterator: object, *held: object) -> Iterator[tuple[bytes, bytes]]:
        """``held``: what the iterator uses and does not keep: its bound is a pointer to somebody's bytes."""
        while iterator.valid():  # type: ignore[attr-defined]
            yield iterator.key(), iterator.value()  # type: ignore[attr-defined]
            iterator.next()  # type: ignore[attr-defined]
        with named_errors(self.path):
            iterator.status()  # type: ignore[attr-defined]
        del held

    def read_all(self) -> int:
        """Read every block of every family, which checks their checksums; how many entries there are. Raises
        StoreCorrupt."""
        count = 0
        for family in (self._state, self._undo, self._meta):
            options = _once_through()
            iterator = family.iter(options)
            iterator.seek_to_first()
            while iterator.valid():
                count += 1
                iterator.next()
            with named_errors(self.path):
                iterator.status()
        return count

    def checkpoint(self, path: Path) -> None:
        with named_errors(self.path):
            Checkpoint(self._db).create_checkpoint(str(path))

    def ingest(self, files: list[Path]) -> None:
        """Take sorted, non-overlapping SST files as state, by moving them in. Raises DiskFull, StoreCorrupt."""
        options = IngestExternalFileOptions()
        options.set_move_files(True)
        with named_errors(self.path):
            self._state.ingest_external_file([str(file) for file in files], options)

    def flush(self) -> None:
        with named_errors(self.path):
            self._db.flush_wal(True)

    def close(self) -> None:
        """Idempotent. Nothing may be read or written afterwards. Raises DiskFull if the disk was full before."""
        if not self._closed:
            self._closed = True
            self._handles = {}  # a handle left keeps the directory locked
            with named_errors(self.path):
                for handle in (self._state, self._undo, self._meta) if hasattr(self, "_meta") else ():
                    handle.close()
                if hasattr(self, "_db"):
                    self._db.close()


def _clear_unborn(path: Path) -> None:
    """A crash before RocksDB wrote CURRENT leaves a directory that cannot be opened and holds nothing: start afresh."""
    if not path.is_dir() or (path / "CURRENT").exists():
        return
    names = [entry.name for entry in path.iterdir()]
    if any(name.endswith(".sst") for name in names):
        raise StoreCorrupt("the store has data files but no CURRENT file", where=str(path))
    if strange := sorted(name for name in names if not _UNBORN.fullmatch(name)):
        raise NotEmpty(
            f"the directory holds {strange[0]!r}, which is no part of a store",
            where=str(path),
            way_out="name an empty directory, or a store's",
        )
    for name in names:
        (path / name).unlink()
