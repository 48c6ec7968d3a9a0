"""Sorted files: what a snapshot's parts are made of, and what a store takes in by moving them.

They carry the filters and indexes of the state family, and are compressed: they travel. RocksDB rewrites them without
compression as it compacts.
"""

from __future__ import annotations

from pathlib import Path

from rocksdict import DBCompressionType, Options, SstFileWriter

from pipeline.stores.rocksdb import named_errors, state_options


def sst_options() -> Options:
    options = state_options()
    options.set_compression_type(DBCompressionType.zstd())
    return options


class SortedFile:
    """An SST file being written: ascending storage keys, at least one, then `finish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = SstFileWriter(sst_options())
        with named_errors(path):
            self._writer.open(str(path))

    def put(self, key: bytes, value: bytes) -> None:
        self._writer[key] = value

    def finish(self) -> int:
        """The file's bytes; it is complete now. Raises DiskFull."""
        with named_errors(self.path):
            self._writer.finish()
        return self.path.stat().st_size
