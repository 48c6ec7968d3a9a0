"""Files of blocks and coins as streams of bytes, decompressed on the way: .gz, .bz2 and .zst, by content.

A name proves nothing, so the first bytes decide; a file may hold several compressed members one after
another. Memory is bounded whatever the file claims: decompression goes in small steps, and a file that
grows by more than the codec's ratio is refused, because blocks and coins never do.

Errors are raised through the ``corrupt`` that the caller gives: a function from a sentence and an offset in
the *decompressed* bytes to the exception it wants to see.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import zstandard

from pipeline.codec import RATIO_MAX

Corrupt = Callable[[str, int], Exception]

_PLAIN_STEP = 1 << 20
_PACKED_STEP = 1 << 10
"""Compressed bytes taken at a time: a zstd block of 4 bytes may grow to 128 KiB, so 1 KiB to 32 MiB at
worst."""
_OUTPUT_STEP = 1 << 20
_SLACK_BYTES = 64 << 20
"""Growth allowed to any file, however small: Core's block files end in up to 16 MiB of zeroes."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class ByteStream:
    """The bytes of a file, taken in order. ``offset`` counts the decompressed bytes taken so far."""

    __slots__ = ("_buffer", "_chunks", "offset")

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()
        self.offset = 0

    def peek(self, count: int) -> bytes:
        """The next bytes without taking them: fewer than ``count`` only at the end."""
        while len(self._buffer) < count and self._fill():
            pass
        return bytes(self._buffer[:count])

    def take(self, count: int) -> bytes:
        """The next bytes: fewer than ``count`` only at the end."""
        taken = self.peek(count)
        del self._buffer[: len(taken)]
        self.offset += len(taken)
        return taken

    def take_line(self, bytes_max: int) -> bytes | None:
        """The next line with its newline, or None at the end. A line longer than ``bytes_max`` comes cut."""
        searched = 0
        while (newline := self._buffer.find(b"\n", searched)) < 0 and len(self._buffer) <= bytes_max:
            searched = len(self._buffer)
            if not self._fill():
                break
        line = self.take(bytes_max + 1 if newline < 0 else min(newline, bytes_max) + 1)
        return line or None

    def _fill(self) -> bool:
        """Read on; False at the end."""
        chunk = next(self._chunks, b"")
        self._buffer += chunk
        return bool(chunk)


@contextmanager
def open_stream(path: Path, corrupt: Corrupt, *, mask: bytes = b"") -> Iterator[ByteStream]:
    """The decompressed bytes of a file, for as long as the context lasts. ``mask``: bytes that were XORed
    over the file, again and again from its start. Raises OSError if it cannot be opened."""
    with path.open("rb") as file:
        if any(mask):
            yield ByteStream(_unmasked(file, mask))
        else:
            yield ByteStream(_chunks(file, path.stat().st_size, corrupt))


def _unmasked(file: BinaryIO, mask: bytes) -> Iterator[bytes]:
    """A masked file is never compressed: its first bytes could not be told."""
    assert _PLAIN_STEP % len(mask) == 0, len(mask)
    pattern = np.frombuffer(mask * (_PLAIN_STEP // len(mask)), np.uint8)
    while chunk := file.read(_PLAIN_STEP):
        yield (np.frombuffer(chunk, np.uint8) ^ pattern[: len(chunk)]).tobytes()


def _chunks(file: BinaryIO, packed_bytes: int, corrupt: Corrupt) -> Iterator[bytes]:
    make = _decompressor_for(file.read(4))
    file.seek(0)
    if make is None:
        while chunk := file.read(_PLAIN_STEP):
            yield chunk
        return
    offset, bytes_max = 0, packed_bytes * RATIO_MAX + _SLACK_BYTES
    members = _members(file, make)
    while True:
        try:
            chunk = next(members, b"")
        except (zlib.error, zstandard.ZstdError, OSError, EOFError, ValueError) as error:
            raise corrupt(f"it cannot be decompressed: {error}", offset) from error
        if not chunk:
            return
        offset += len(chunk)
        if offset > bytes_max:
            raise corrupt(f"its {packed_bytes} bytes decompress to more than {bytes_max}", offset)
        yield chunk


def _members(file: BinaryIO, make: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """All members of a compressed file, in non-empty chunks. Raises EOFError if the last one is cut short."""
    pending = file.read(_PACKED_STEP)
    while pending:
        decompressor = make()
        while not decompressor.eof:
            if decompressor.needs_input and not pending:
                pending = file.read(_PACKED_STEP)
                if not pending:
                    raise EOFError("it ends before its compressed data does")
            chunk = decompressor.decompress(pending, _OUTPUT_STEP)
            pending = b""
            if chunk:
                yield chunk
        pending = decompressor.unused_data or file.read(_PACKED_STEP)


def _decompressor_for(head: bytes) -> Callable[[], _Decompressor] | None:
    if head[:2] == b"\x1f\x8b":
        return _Gunzip
    if head[:3] == b"BZh":
        return bz2.BZ2Decompressor
    if head == b"\x28\xb5\x2f\xfd":
        return _Unzstd
    return None


class _Gunzip:
    """zlib's gzip reader with the interface of bz2's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._is_full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        # A full output may leave more inside, even where all input is consumed.
        return not (self._is_full or self._inner.unconsumed_tail)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        chunk = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._is_full = len(chunk) == max_length
        return chunk


class _Unzstd:
    """zstandard's reader with the interface of bz2's; it has no ``max_length``: `_PACKED_STEP` bounds it."""

    needs_input = True

    def __init__(self) -> None:
        self._inner = zstandard.ZstdDecompressor().decompressobj()

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(data)
