"""Compression: what comes back, and everything that must be refused before memory is taken for it."""

from __future__ import annotations

import tracemalloc

import cramjam
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.codec import RATIO_MAX, Codec, CodecError, compress, decompress

MIB = 1 << 20
SKIPPABLE = b"\x50\x2a\x4d\x18\x00\x00\x00\x00"


@given(st.binary(max_size=2000) | st.binary(max_size=4).map(lambda part: part * 5000), st.sampled_from(Codec))
def test_round_trip(raw: bytes, codec: Codec) -> None:
    """What was compressed comes back, from bytes and from a view, with and without its size known."""
    packed = compress(raw, codec)

    assert decompress(packed, codec, raw_bytes_max=len(raw)) == raw
    assert decompress(memoryview(packed), codec, raw_bytes_max=MIB, raw_bytes=len(raw)) == raw


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=9), st.sampled_from((Codec.SNAPPY, Codec.ZSTD)))
def test_trailing_bytes_are_refused(raw: bytes, extra: bytes, codec: Codec) -> None:
    """Nothing may stand behind the compressed bytes."""
    with pytest.raises(CodecError):
        decompress(compress(raw, codec) + extra, codec, raw_bytes_max=MIB)


@given(st.binary(max_size=60), st.sampled_from((Codec.SNAPPY, Codec.ZSTD)))
def test_garbage_raises_codec_error_only(packed: bytes, codec: Codec) -> None:
    """Any bytes decompress within the bound, or raise CodecError."""
    for data in (packed, compress(packed * 3, codec)[: len(packed)], zstandard.FRAME_HEADER + packed):
        try:
            raw = decompress(data, codec, raw_bytes_max=4096)
        except CodecError:
            continue
        assert len(raw) <= 4096


@pytest.mark.parametrize("codec", Codec)
def test_size_is_checked_against_bound_and_header(codec: Codec) -> None:
    """A declared size over the bound, or other than the header's, is refused."""
    packed = compress(b"x" * 100, codec)

    assert decompress(packed, codec, raw_bytes_max=100, raw_bytes=100) == b"x" * 100
    with pytest.raises(CodecError, match="over the bound of 99"):
        decompress(packed, codec, raw_bytes_max=99)
    with pytest.raises(CodecError, match="the header says 101"):
        decompress(packed, codec, raw_bytes_max=1000, raw_bytes=101)


def bomb(codec: Codec, raw_bytes: int) -> bytes:
    """A few bytes that declare a great size."""
    if codec is Codec.ZSTD:
        return zstandard.ZstdCompressor().compress(bytes(raw_bytes))
    varint = bytes([*(raw_bytes >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21)), raw_bytes >> 28])
    assert cramjam.snappy.decompress_raw_len(varint) == raw_bytes
    return varint


@pytest.mark.parametrize("codec", [Codec.SNAPPY, Codec.ZSTD])
def test_bomb_is_refused_before_allocation(codec: Codec) -> None:
    """64 MiB out of a few bytes: over the ratio, and refused without taking the memory."""
    packed = bomb(codec, 64 * MIB)
    tracemalloc.start()
    with pytest.raises(CodecError, match=f"over the ratio of {RATIO_MAX}"):
        decompress(packed, codec, raw_bytes_max=1 << 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < MIB


@pytest.mark.parametrize(
    "packed",
    [
        zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 9),
        compress(b"", Codec.ZSTD) * 2,
        compress(b"abc", Codec.ZSTD) * 2,
        SKIPPABLE,
        SKIPPABLE + compress(b"abc", Codec.ZSTD),
        compress(b"abc", Codec.ZSTD) + SKIPPABLE,
        compress(b"abc" * 99, Codec.ZSTD)[:-1],
        b"",
    ],
    ids=["no-size", "two-empty", "two", "skippable", "skippable-first", "skippable-last", "cut", "nothing"],
)
def test_only_one_whole_frame_with_size_is_zstd(packed: bytes) -> None:
    """One zstd frame that declares its size, and nothing else."""
    with pytest.raises(CodecError):
        decompress(packed, Codec.ZSTD, raw_bytes_max=MIB)


def test_frame_with_dictionary_is_refused() -> None:
    """A frame that names a dictionary cannot be read by everybody."""
    samples = [f"{number} sample of text {number * 7}".encode() * 3 for number in range(2000)]
    dictionary = zstandard.train_dictionary(4096, samples)
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[0])

    with pytest.raises(CodecError, match="dictionary"):
        decompress(packed, Codec.ZSTD, raw_bytes_max=MIB)
