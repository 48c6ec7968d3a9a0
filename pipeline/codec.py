"""Compression, with bounds that hold before anything is allocated.

`zstandard` ignores ``max_output_size`` when a frame declares its size, so the declared size is required, checked
first, and trailing bytes are refused. Snappy's raw format also declares its size, in its first bytes.
"""

from __future__ import annotations

import enum
import threading

import cramjam
import zstandard

ZSTD_LEVEL = 3
"""On real blocks 90% of a diff is hashes: higher levels cost time and gain nothing (see `stateferry bench wire`)."""

ZSTD_LEVEL_FAST = 1
"""For what every node writes for itself, block by block: a third of the time for 2% more bytes."""

RATIO_MAX = 4096
"""Nothing may grow by more than this on decompression. zstd's own limit on zeroes is higher: such data is a bomb."""

_SLACK_BYTES = 64 << 10  # tiny inputs may exceed the ratio: an all-zero column of a few KB compresses to 20 bytes


class Codec(enum.IntEnum):
    """Named in every header that carries compressed bytes."""

    NONE = 0
    SNAPPY = 1
    ZSTD = 2


class CodecError(ValueError):
    """Bytes that cannot be decompressed within their bounds; the caller says whose bytes they were."""


class _Contexts(threading.local):
    """zstd contexts are not safe to share between threads."""

    def __init__(self) -> None:
        self.compressors = {
            level: zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
            for level in (ZSTD_LEVEL, ZSTD_LEVEL_FAST)
        }
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(raw: bytes, codec: Codec, *, zstd_level: int = ZSTD_LEVEL) -> bytes:
    if codec is Codec.NONE:
        return raw
    if codec is Codec.SNAPPY:
        return bytes(cramjam.snappy.compress_raw(raw))
    return _contexts.compressors[zstd_level].compress(raw)


def decompress(packed: bytes | memoryview, codec: Codec, *, raw_bytes_max: int, raw_bytes: int | None = None) -> bytes:
    """``raw_bytes``, where given, is the exact size that a header declared. Raises CodecError, before allocating."""
    if codec is Codec.NONE:
        _check_size(len(packed), len(packed), raw_bytes_max, raw_bytes)
        return bytes(packed)
    if codec is Codec.SNAPPY:
        try:
            declared = cramjam.snappy.decompress_raw_len(bytes(packed))
            _check_size(declared, len(packed), raw_bytes_max, raw_bytes)
            raw = bytes(cramjam.snappy.decompress_raw(bytes(packed)))
        except cramjam.DecompressionError as error:
            raise CodecError(f"not a snappy block: {error}") from error
    else:
        try:
            parameters = zstandard.get_frame_parameters(packed)
            declared = parameters.content_size
            if declared == zstandard.CONTENTSIZE_UNKNOWN or parameters.dict_id:
                raise CodecError("a zstd frame without a declared size, or with a dictionary")
            _check_size(declared, len(packed), raw_bytes_max, raw_bytes)
            raw = _decompress_zstd(packed, declared)
        except zstandard.ZstdError as error:
            raise CodecError(f"not a whole zstd frame: {error}") from error
    if len(raw) != declared:
        raise CodecError(f"{len(raw)} bytes came out where {declared} were declared")
    return raw


def _decompress_zstd(packed: bytes | memoryview, declared: int) -> bytes:
    if declared:
        return _contexts.decompressor.decompress(packed, allow_extra_data=False)
    # `decompress` looks at nothing behind a header that declares 0 bytes.
    stream = _contexts.decompressor.decompressobj()
    raw = stream.decompress(packed)
    if not stream.eof or stream.unused_data or bytes(packed[:4]) != zstandard.FRAME_HEADER:
        raise CodecError("not one empty zstd frame and nothing else")
    return raw


def _check_size(declared: int, packed: int, raw_bytes_max: int, raw_bytes: int | None) -> None:
    if declared > raw_bytes_max:
        raise CodecError(f"{declared} bytes declared, over the bound of {raw_bytes_max}")
    if declared > packed * RATIO_MAX + _SLACK_BYTES:
        raise CodecError(f"{declared} bytes declared out of {packed}: over the ratio of {RATIO_MAX}")
    if raw_bytes is not None and declared != raw_bytes:
        raise CodecError(f"{declared} bytes declared where the header says {raw_bytes}")
