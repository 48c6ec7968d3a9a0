"""Frames: both directions, a prefix that every version shares, and ids over content and links alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline import codec, frame
from pipeline.block import BlockRef
from pipeline.codec import Codec
from pipeline.errors import FrameCorrupt, Unsupported
from pipeline.frame import Feature, Header, Kind, Prefix, decode, encode, frame_id, peek, peek_prefix

APPLY = Header(
    kind=Kind.APPLY,
    codec=Codec.ZSTD,
    optional=0x8000_0001,
    generation=b"g" * 16,
    epoch=3,
    writer=b"w" * 16,
    shard=1,
    shards=4,
    chain_id="main",
    seq=7,
    walk=9,
    source_epoch=2,
    source_writer=b"s" * 16,
    ref=BlockRef(500, b"b" * 32),
    parent_hash=b"p" * 32,
    prev_root=b"r" * 32,
    post_root=b"R" * 32,
    prev_frame_id=b"i" * 32,
    frame_id=b"I" * 32,
    next_input_offset=77,
    input_digest=b"d" * 32,
    block_time_s=-5,
    op_count=2,
    table_roots={1: b"1" * 32, 3: b"3" * 32},
)
UNDO = replace(APPLY, kind=Kind.UNDO, codec=Codec.NONE)
EPOCH = Header(
    kind=Kind.EPOCH,
    codec=Codec.NONE,
    generation=b"g" * 16,
    epoch=4,
    writer=b"v" * 16,
    chain_id="main",
    table_roots={},
)
TAKES_BACK = replace(
    EPOCH,
    required=Feature.TAKES_BACK,
    shards=2,
    seq=7,
    walk=9,
    prev_frame_id=b"i" * 32,
    source_epoch=2,
    source_writer=b"s" * 16,
    next_input_offset=77,
    input_digest=b"d" * 32,
)
BODY = b"columns " * 40
VECTORS = [
    (APPLY, BODY),
    (replace(APPLY, codec=Codec.SNAPPY), BODY),
    (replace(APPLY, codec=Codec.NONE, required=Feature.SELF_CONTAINED), BODY),
    (UNDO, b""),
    (replace(UNDO, required=Feature.SELF_CONTAINED), BODY),
    (EPOCH, b""),
    (TAKES_BACK, b""),
    (replace(EPOCH, kind=Kind.GENERATION, epoch=0, writer=bytes(16)), b"opening"),
]


def sealed(data: bytes) -> bytes:
    """The bytes of a frame with a checksum that matches."""
    return data[:-16] + xxhash.xxh3_128_digest(data[:-16])


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return sealed(data[:at] + new + data[at + len(new) :])


@pytest.mark.parametrize(("header", "body"), VECTORS)
def test_round_trip(header: Header, body: bytes) -> None:
    """What was encoded comes back: the header alone, and with its body."""
    data = encode(header, body)

    assert decode(data) == frame.Frame(header=header, body=body)
    assert peek(data) == header
    assert encode(header, body) == data


@given(st.binary(max_size=100), st.sampled_from(Codec), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 63) - 1))
def test_any_body_and_number_come_back(body: bytes, packing: Codec, large: int, offset: int) -> None:
    """A body that compression would not shorten goes out as it is, and the header says so."""
    header = replace(APPLY, codec=packing, seq=large or 1, walk=large, next_input_offset=offset, block_time_s=-offset)
    decoded = decode(encode(header, body))

    assert decoded.body == body
    assert replace(decoded.header, codec=packing) == header
    assert decoded.header.codec in (packing, Codec.NONE)
    assert len(encode(header, body)) <= len(encode(replace(header, codec=Codec.NONE), body))


def test_prefix_stands_at_the_same_bytes_in_every_version() -> None:
    """Magic, version, kind, codec, features, generation, epoch, writer, shard, shards: 60 bytes for ever."""
    data = encode(APPLY, BODY)

    assert (
        data[:60].hex()
        == ("53466672" + "0100" + "01" + "02" + "00000000" + "01000080" + "67" * 16 + "0300000000000000" + "77" * 16)
        + "0100"
        + "0400"
    )


def test_prefix_is_read_in_every_version() -> None:
    """Whose frame it is can be told of a version that means nothing here."""
    newer = patched(encode(APPLY, BODY), 4, b"\x09\x00\x2a")

    assert peek_prefix(newer) == Prefix(
        version=9, kind=42, generation=b"g" * 16, epoch=3, writer=b"w" * 16, shard=1, shards=4
    )


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (4, b"\x02\x00", "a frame of version 2"),
        (4, b"\x00\x01", "a frame of version 256"),
        (6, b"\x05", "kind 5"),
        (6, b"\x00", "kind 0"),
        (7, b"\x03", "codec 3"),
        (8, b"\x04", "unknown features \\(0x4\\)"),
        (8, b"\x01\x00\x00\x80", "unknown features"),
    ],
)
def test_unknown_is_unsupported(at: int, new: bytes, message: str) -> None:
    """A version, kind, codec or required feature of a later build stops the reader by that name."""
    data = patched(encode(APPLY, BODY), at, new)

    with pytest.raises(Unsupported, match=message):
        peek(data)


def test_unknown_optional_features_are_read_over() -> None:
    """An optional feature is one that a reader may not know."""
    data = patched(encode(APPLY, BODY), 12, b"\xff\xff\xff\xff")

    assert peek(data).optional == 0xFFFF_FFFF


@pytest.mark.parametrize(("header", "body"), [VECTORS[0], VECTORS[3]], ids=["apply", "undo"])
def test_every_flip_and_cut_is_noticed(header: Header, body: bytes) -> None:
    """No bit of a frame can change, and no byte go or come, without FrameCorrupt."""
    data = encode(header, body)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        for damaged in (bytes(flipped), data[:at]):
            assert peek_prefix(damaged) is None
            with pytest.raises(FrameCorrupt):
                decode(damaged)
    with pytest.raises(FrameCorrupt):
        decode(data + b"\0")


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (60, b"\0" * 32, "a chain id that cannot be"),
        (60, b"ab\0c", "a chain id that cannot be"),
        (60, b"\xff", "not ASCII"),
        (56, b"\x04\x00", "shard 4 of 4"),
        (58, b"\x00\x00", "shard 1 of 0"),
        (92, bytes(8), "without seq or epoch"),
        (32, bytes(8), "without seq or epoch"),
        (384, b"\xff\xff\xff\x7f", "over the bound"),
        (384, b"\x41\x01\x00\x00", "cannot be decompressed"),
        (388, b"\xff\xff\xff\xff", "do not sum up"),
        (392, b"\x00", "do not sum up"),
        (392, b"\xff", "do not sum up"),
        (393, b"\x03", "out of order"),
        (393, b"\x04", "out of order"),
        (459, b"junk", "cannot be decompressed"),
    ],
)
def test_undamaged_frame_that_cannot_be_is_corrupt(at: int, new: bytes, message: str) -> None:
    """A matching checksum over a header or body that no writer makes is refused all the same."""
    data = patched(encode(APPLY, BODY), at, new)

    with pytest.raises(FrameCorrupt, match=message):
        decode(data)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (replace(APPLY, chain_id=""), BODY),
        (replace(APPLY, chain_id="x" * 33), BODY),
        (replace(APPLY, chain_id="münze"), BODY),
        (replace(APPLY, shard=4), BODY),
        (replace(APPLY, seq=0), BODY),
        (replace(APPLY, epoch=0), BODY),
        (replace(APPLY, table_roots={}), BODY),
        (UNDO, BODY),
        (replace(EPOCH, seq=1), b""),
        (replace(EPOCH, required=Feature.SELF_CONTAINED), b""),
        (replace(TAKES_BACK, shards=1), b""),
        (replace(TAKES_BACK, kind=Kind.GENERATION), b""),
        (replace(APPLY, required=Feature.TAKES_BACK), BODY),
    ],
)
def test_the_same_is_checked_on_the_way_out(header: Header, body: bytes) -> None:
    """Nothing leaves that a reader would refuse."""
    with pytest.raises(FrameCorrupt):
        encode(header, body)


def test_bomb_is_refused() -> None:
    """A body that would grow by more than the ratio is corrupt, whatever the header says."""
    packed = codec.compress(bytes(200 << 20), Codec.ZSTD)
    data = encode(replace(APPLY, codec=Codec.NONE), packed)
    data = patched(data, 7, b"\x02")

    with pytest.raises(FrameCorrupt, match="ratio"):
        decode(patched(data, 384, (200 << 20).to_bytes(4, "little")))


LINKS: dict[str, Any] = {
    "kind": Kind.UNDO,
    "generation": b"G" * 16,
    "shard": 2,
    "shards": 5,
    "seq": 8,
    "ref": BlockRef(501, b"b" * 32),
    "parent_hash": b"q" * 32,
    "prev_root": b"q" * 32,
    "post_root": b"q" * 32,
    "prev_frame_id": b"q" * 32,
    "table_roots": {1: b"1" * 32, 3: b"q" * 32},
}
NO_LINKS: dict[str, Any] = {
    "codec": Codec.NONE,
    "required": Feature.SELF_CONTAINED,
    "optional": 0,
    "epoch": 9,
    "writer": b"W" * 16,
    "walk": 90,
    "source_epoch": 9,
    "source_writer": b"S" * 16,
    "frame_id": bytes(32),
    "next_input_offset": 99,
    "input_digest": bytes(32),
    "block_time_s": 99,
    "op_count": 99,
}
CONTENT = {1: b"c" * 32}


def test_id_depends_on_content_and_every_link() -> None:
    """Another table's digest, another link: another id, each its own."""
    ids = [frame_id(replace(APPLY, **{name: value}), CONTENT) for name, value in LINKS.items()]
    ids += [frame_id(replace(APPLY, ref=BlockRef(500, b"q" * 32)), CONTENT)]
    ids += [frame_id(APPLY, content) for content in (CONTENT, {}, {1: b"q" * 32}, {2: b"c" * 32}, CONTENT | {2: b""})]

    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", NO_LINKS)
def test_id_does_not_depend_on_how_and_by_whom(name: str) -> None:
    """Another build's or writer's emission of the same block has the same id."""
    other = replace(APPLY, **{name: NO_LINKS[name]})

    assert other != APPLY
    assert frame_id(other, CONTENT) == frame_id(APPLY, CONTENT)


def test_every_header_field_is_either_a_link_or_not() -> None:
    """A field added to the header must be put into one of the two lists; the chain id is the generation's."""
    assert LINKS.keys() | NO_LINKS.keys() | {"chain_id"} == set(Header.__dataclass_fields__)
