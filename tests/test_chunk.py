"""Chunks: cut and put together, never mixed, bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline import chunk
from pipeline.chunk import MESSAGE_BYTES_MAX, Assembler, Chunk, Origin, cut, decode_chunk, is_chunk, peek_origin
from pipeline.errors import FrameCorrupt, Unsupported

OVERHEAD_BYTES = 109


def cut_small(message: bytes, payload_bytes: int = 10, *, number: int = 5) -> list[bytes]:
    return cut(
        message,
        generation=b"g" * 16,
        epoch=3,
        writer=b"w" * 16,
        number=number,
        record_bytes_max=OVERHEAD_BYTES + payload_bytes,
    )


def fed(assembler: Assembler, records: list[bytes]) -> list[bytes | None]:
    return [assembler.feed(decode_chunk(record)) for record in records]


def sealed(record: bytes) -> bytes:
    return record[:-8] + xxhash.xxh3_64_digest(record[:-8])


MESSAGE = bytes(range(256))
RECORDS = cut_small(MESSAGE, 100)


@given(st.binary(min_size=1, max_size=700), st.integers(1, 60))
def test_round_trip(message: bytes, payload_bytes: int) -> None:
    """A message that fits goes as it is; a larger one comes back from its last chunk, and no record is too large."""
    records = cut_small(message, payload_bytes)
    if len(message) <= OVERHEAD_BYTES + payload_bytes:
        assert records == [message]
        return
    assembler = Assembler()

    assert fed(assembler, records) == [None] * (len(records) - 1) + [message]
    assert max(map(len, records)) <= OVERHEAD_BYTES + payload_bytes
    assert assembler.held_bytes == 0


def test_chunk_says_whose_and_which() -> None:
    """Each chunk names generation, epoch, writer, number, the whole, and its place in it."""
    assert is_chunk(RECORDS[1]) and not is_chunk(MESSAGE)
    assert peek_origin(RECORDS[1]) == Origin(b"g" * 16, 3, b"w" * 16)
    assert decode_chunk(RECORDS[1]) == Chunk(
        generation=b"g" * 16,
        epoch=3,
        writer=b"w" * 16,
        number=5,
        digest=chunk.blake3(MESSAGE).digest(),
        index=1,
        count=3,
        total_bytes=256,
        payload=MESSAGE[100:200],
    )


def test_origin_stands_at_the_same_bytes_in_every_version() -> None:
    """Whose chunk it is can be told of any version; what is in it cannot."""
    newer = sealed(RECORDS[0][:4] + b"\x02" + RECORDS[0][5:])

    assert peek_origin(newer) == Origin(b"g" * 16, 3, b"w" * 16)
    with pytest.raises(Unsupported, match="version 2"):
        decode_chunk(newer)


def test_every_flip_and_cut_is_noticed() -> None:
    """No bit of a chunk can change, and no byte go, without it being damaged."""
    for at in range(len(RECORDS[0])):
        flipped = bytearray(RECORDS[0])
        flipped[at] ^= 1 << at % 8
        for damaged in (bytes(flipped), RECORDS[0][:at]):
            assert peek_origin(damaged) is None
            with pytest.raises(FrameCorrupt):
                decode_chunk(damaged)


@pytest.mark.parametrize(
    ("index", "count", "total"),
    [(3, 3, 256), (0, 1, 256), (0, 0, 256), (0, 257, 256), (0, 3, MESSAGE_BYTES_MAX + 1)],
)
def test_numbers_that_cannot_be_are_corrupt(index: int, count: int, total: int) -> None:
    """An index below the count, at least two chunks of at least a byte each, within the bound of a message."""
    numbers = index.to_bytes(4, "little") + count.to_bytes(4, "little") + total.to_bytes(8, "little")
    record = sealed(RECORDS[0][:85] + numbers + RECORDS[0][101:])

    with pytest.raises(FrameCorrupt, match="cannot be"):
        decode_chunk(record)


def test_chunk_without_payload_is_corrupt() -> None:
    """An empty chunk carries nothing that a writer would cut off."""
    with pytest.raises(FrameCorrupt, match="truncated"):
        decode_chunk(sealed(RECORDS[0][:101] + bytes(8)))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_message_with_a_hole_never_comes(lost: int) -> None:
    """Without one of its chunks a message does not come, and the next one is not disturbed."""
    assembler = Assembler()
    holed = RECORDS[:lost] + RECORDS[lost + 1 :]

    assert fed(assembler, holed) == [None, None]
    assert fed(assembler, RECORDS)[-1] == MESSAGE


def test_first_chunk_starts_over() -> None:
    """A chunk 0 discards what is incomplete: the writer began again."""
    assembler = Assembler()

    assert fed(assembler, [*RECORDS[:2], *RECORDS])[-1] == MESSAGE


@pytest.mark.parametrize(
    "change",
    [{"digest": bytes(32)}, {"count": 4}, {"total_bytes": 255}, {"epoch": 4}, {"writer": bytes(16)}, {"number": 6}],
    ids=str,
)
def test_chunks_of_two_messages_are_never_mixed(change: dict[str, object]) -> None:
    """A chunk that differs in what names its message does not continue it."""
    first, second, third = map(decode_chunk, RECORDS)
    assembler = Assembler()
    assembler.feed(first)

    assert assembler.feed(replace(second, **change)) is None  # type: ignore[arg-type]
    assert assembler.held_bytes == 0
    assert assembler.feed(third) is None


def test_other_bytes_than_the_digest_says_never_come() -> None:
    """A whole message whose digest is another's is dropped."""
    first, second, third = map(decode_chunk, RECORDS)
    assembler = Assembler()

    for part in (first, replace(second, payload=bytes(100)), third):
        assert assembler.feed(part) is None
    assert assembler.held_bytes == 0


def test_never_holds_more_than_announced() -> None:
    """Chunks that bring more bytes than their message has are discarded at once."""
    first, second, _ = map(decode_chunk, RECORDS)
    assembler = Assembler()
    assembler.feed(first)

    assert assembler.held_bytes == 100
    assert assembler.feed(replace(second, payload=bytes(157))) is None
    assert assembler.held_bytes == 0
    assert assembler.held_bytes == 0


def test_discard_forgets_what_is_incomplete() -> None:
    """After a discard the rest of a message leads nowhere."""
    assembler = Assembler()
    fed(assembler, RECORDS[:2])
    assembler.discard()

    assert fed(assembler, RECORDS[2:]) == [None]
