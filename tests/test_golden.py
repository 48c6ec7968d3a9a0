"""Bytes of every released version are read for ever: files against literal values.

`golden/make.py` wrote the files, and refuses to write one again: what stands here was once on somebody's disk.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from blake3 import blake3
from walks import GENERATION, NO_PARENT, OPENING, STAMP, block, coin, ref

from pipeline import frame, journal
from pipeline.apply import apply_references, apply_whole
from pipeline.archive import Segment, resume_record
from pipeline.archive_names import SegmentName
from pipeline.block import BlockRef, Connect, Event, Op, Rewind, SourceEpoch, decode_event, encode_event
from pipeline.chunk import Assembler, decode_chunk
from pipeline.codec import Codec
from pipeline.diff import Diff, decode_reference_body, decode_whole_body
from pipeline.floor import EventsFloor, FramesFloor, ShardFloor, decode_floor, encode_floor
from pipeline.frame import Feature, Header, Kind
from pipeline.generation import Generation, decode_end, decode_generation, decode_opening
from pipeline.position import LogMark, Meta, decode_meta
from pipeline.range_pieces import Piece
from pipeline.segment_index import SegmentIndex
from pipeline.signature import check_signature
from pipeline.snapshot import decode_manifest, encode_manifest
from pipeline.state import UTXO, Change
from pipeline.verify import audit, check_audit

GOLDEN = Path(__file__).parent / "golden"
V1 = GOLDEN / "v1"

DIGESTS = {
    "chunk_0": "67844ef3f6df536e",
    "chunk_1": "65c757b64616425f",
    "event_connect_0": "01fc0c2f235da40a",
    "event_connect_1": "1531b923fa33bdf6",
    "event_epoch": "ab6f3c9359f5042d",
    "event_rewind": "a48c5d72f9df825b",
    "floor": "21b8e06b705e596a",
    "frame_apply_0_none": "802ac1d79b1543e0",
    "frame_apply_0_snappy": "192831b36049a711",
    "frame_apply_0_zstd": "5d03cd1caa477b3f",
    "frame_apply_1_whole": "8716033c118ddfb3",
    "frame_apply_1_zstd": "5e616d05cb37451d",
    "frame_end": "a284880a712bcc46",
    "frame_epoch": "a360ec438f55b693",
    "frame_epoch_takes_back": "cda22a4fc93698c1",
    "frame_opening": "4abb21d417427ed5",
    "frame_undo_zstd": "521b44e151206e7e",
    "generation_first": "54e61230ec07d691",
    "generation_second": "58adda2699ee13bc",
    "journal_entry": "1b1e52944fbbcc30",
    "manifest": "62d2d45012461ac5",
    "manifest_of_shards": "0e1e00808c526f48",
    "manifest_signed": "f67e3cb5ab6bb68c",
    "meta": "f22ed1b706b82951",
    "range": "61547630242eb141",
    "segment": "cd7c17ff0976875e",
    "segment_frames_last": "2b9d2d7b17697733",
    "segment_with_filters": "c4b8bd21922b4bac",
    "stored": "7ce693adab240ea2",
}
COIN = b"\x02" + bytes(60)
ROOTS = [
    bytes.fromhex("fd0470442b43553fd19048fa9331596d797dd8e3274b924c42e251c99bd1366f"),
    bytes.fromhex("bd44fc0277accc2a4e2817ac27189155f4cb13957a28dbe3feb6e91fca8a5076"),
]
IDS = [
    bytes.fromhex("09a864d9fa92aea6aa77ea533a26a6ec5d0d32f7698b7cca6670c88ce92ea107"),
    bytes.fromhex("5f63dad86c6ee0f9606ac33ae10112eb42276cdddbd27b45e194edb274709a45"),
    bytes.fromhex("0ba2a144fb27ede1a8a8c4a7741202667e770b31e4371e8ca558e07a9335fc04"),
]
STATE = {
    coin(1): b"one" + COIN,
    coin(1, 0, 1): b"two" + COIN,
    coin(1, 1, 2): b"three" + COIN,
    coin(2): COIN,
}
CHANGES = [
    Change(coin(1, 0, 1), b"two" + COIN, None),
    Change(coin(1, 1, 2), b"three" + COIN, b""),
    Change(coin(3), None, COIN),
]
SUCCESSOR = Generation(
    generation=b"n" * 16,
    chain_id="walk",
    number=2,
    previous=b"g" * 16,
    base=BlockRef(9, b"9" * 32),
    base_vectors={1: bytes(range(256)) * 8},
    base_counts={1: 5},
    base_manifest="walk/manifest",
)


def golden(name: str) -> bytes:
    return (V1 / f"{name}.bin").read_bytes()


def test_files_are_the_ones_that_were_written() -> None:
    """No file was changed, none is missing, none is unknown here."""
    assert {file.stem: blake3(file.read_bytes()).hexdigest()[:16] for file in V1.iterdir()} == DIGESTS


EVENTS: list[tuple[str, Event]] = [
    ("event_epoch", SourceEpoch(stamp=STAMP, resume_walk=1)),
    ("event_rewind", Rewind(stamp=STAMP, walk=3, to=ref(0))),
    (
        "event_connect_0",
        Connect(
            stamp=STAMP,
            walk=1,
            block=block(ref(0), NO_PARENT, *[(Op.CREATE, key, value) for key, value in STATE.items()]),
        ),
    ),
    (
        "event_connect_1",
        Connect(
            stamp=STAMP,
            walk=2,
            block=block(
                ref(1),
                b"0".ljust(32, b"."),
                (Op.DELETE, coin(1, 0, 1)),
                (Op.PUT, coin(1, 1, 2), b""),
                (Op.CREATE, coin(3), COIN),
                (Op.CREATE, coin(4), COIN),
                (Op.DELETE, coin(4)),
            ),
        ),
    ),
]


@pytest.mark.parametrize(("name", "event"), EVENTS, ids=[name for name, _ in EVENTS])
def test_events(name: str, event: Event) -> None:
    """Every kind of event is read as what it was."""
    assert decode_event(golden(name)) == event


@pytest.mark.parametrize("name", ["event_epoch", "event_rewind"])
def test_events_are_written_alike(name: str) -> None:
    """Without compression in between, this build writes the very bytes."""
    assert encode_event(decode_event(golden(name))) == golden(name)


APPLY_1 = Header(
    kind=Kind.APPLY,
    codec=Codec.ZSTD,
    generation=b"g" * 16,
    epoch=1,
    writer=b"w" * 16,
    chain_id="walk",
    seq=2,
    walk=2,
    source_epoch=1,
    source_writer=b"s" * 16,
    ref=BlockRef(1, b"1".ljust(32, b".")),
    parent_hash=b"0".ljust(32, b"."),
    prev_root=ROOTS[0],
    post_root=ROOTS[1],
    prev_frame_id=IDS[0],
    frame_id=IDS[1],
    next_input_offset=3,
    input_digest=blake3(golden("event_connect_1")).digest(),
    block_time_s=1_600_000_001,
    op_count=3,
    table_roots={1: frame.peek(golden("frame_apply_1_zstd")).table_roots[1]},
)


def held(state: dict[bytes, bytes]) -> dict[bytes, bytes]:
    stored: dict[bytes, bytes] = {}
    for key, value in state.items():
        (at,) = UTXO.storage_keys([key])
        stored[at] = UTXO.with_value(key, stored.get(at), value) or b""
    return stored


def read_state(keys: list[bytes]) -> list[bytes | None]:
    return list(map(held(STATE).get, keys))


def id_of(header: Header, diff: Diff) -> bytes:
    return frame.frame_id(header, diff.encode().digests)


@pytest.mark.parametrize("codec", Codec)
def test_first_frame_in_every_codec(codec: Codec) -> None:
    """Whatever the codec, the same content under the same id."""
    decoded = frame.decode(golden(f"frame_apply_0_{codec.name.lower()}"))
    diff, _ = apply_references(decode_reference_body(decoded.body), lambda keys: [None] * len(keys))

    assert decoded.header.codec is codec
    assert decoded.header.post_root == ROOTS[0]
    assert decoded.header.frame_id == IDS[0] == id_of(decoded.header, diff)
    assert diff.tables[1].changes() == [Change(key, None, value) for key, value in sorted(STATE.items())]


def test_second_frame_in_both_forms() -> None:
    """References meet the state before, the whole form needs none: one header, one content, one id."""
    sent, whole = frame.decode(golden("frame_apply_1_zstd")), frame.decode(golden("frame_apply_1_whole"))
    diff, effect = apply_references(decode_reference_body(sent.body), read_state)

    assert sent.header == APPLY_1
    assert whole.header == replace(APPLY_1, required=Feature.SELF_CONTAINED)
    assert diff == decode_whole_body(whole.body)
    assert diff.tables[1].changes() == CHANGES
    assert apply_whole(diff, read_state) == effect
    assert id_of(APPLY_1, diff) == IDS[1]


def test_undo_frame() -> None:
    """The block is taken off: the frame says so without a body, and its id is over what is undone."""
    decoded = frame.decode(golden("frame_undo_zstd"))
    header = decoded.header

    assert (header.kind, header.codec, decoded.body) == (Kind.UNDO, Codec.NONE, b"")
    assert (header.seq, header.walk, header.ref, header.parent_hash) == (3, 3, APPLY_1.ref, APPLY_1.parent_hash)
    assert (header.prev_root, header.post_root, header.prev_frame_id) == (ROOTS[1], ROOTS[0], IDS[1])
    assert header.frame_id == IDS[2]
    assert id_of(header, decode_whole_body(frame.decode(golden("frame_apply_1_whole")).body)) == IDS[2]


def test_frames_of_the_partition() -> None:
    """The opening, an EPOCH, one that takes frames back, and the end that names a successor."""
    epoch, end = frame.decode(golden("frame_epoch")), frame.decode(golden("frame_end"))

    assert decode_opening(golden("frame_opening")) == OPENING
    assert (epoch.header.kind, epoch.header.epoch, epoch.header.writer) == (Kind.EPOCH, 1, b"w" * 16)
    back = frame.decode(golden("frame_epoch_takes_back")).header
    assert (back.kind, back.epoch, back.writer, back.required) == (Kind.EPOCH, 3, b"x" * 16, Feature.TAKES_BACK)
    assert (back.shard, back.shards, back.seq, back.walk, back.prev_frame_id) == (1, 2, 7, 9, b"7" * 32)
    assert (back.source_epoch, back.source_writer) == (2, b"s" * 16)
    assert (back.next_input_offset, back.input_digest) == (12, b"d" * 32)
    assert (end.header.kind, end.header.epoch, end.header.writer) == (Kind.GENERATION, 2, b"v" * 16)
    assert decode_end(end.body) == SUCCESSOR


def test_chunks() -> None:
    """Two chunks are the first frame again."""
    assembler = Assembler()

    assert assembler.feed(decode_chunk(golden("chunk_0"))) is None
    assert assembler.feed(decode_chunk(golden("chunk_1"))) == golden("frame_apply_0_zstd")


def test_floor() -> None:
    """Of two shards, both of which read the event before offset 14 of their partitions last."""
    floor = decode_floor(golden("floor"))
    ref, source = BlockRef(9, b"9" * 32), (1, b"s" * 16)
    events = EventsFloor(ref=ref, mark=LogMark(next_offset=14, last_digest=b"b" * 32), walk=12, source=source)
    frames = FramesFloor(mark=LogMark(next_offset=20, last_digest=b"d" * 32), epoch=2, writer=b"w" * 16)

    assert (floor.generation, floor.ref, floor.shards) == (
        b"g" * 16,
        ref,
        (ShardFloor(frames=frames, events=events),) * 2,
    )
    assert floor.blocks == replace(events, mark=LogMark(next_offset=11, last_digest=b""))
    assert encode_floor(floor) == golden("floor")


def test_generation_records() -> None:
    """The first generation and one that follows it."""
    assert decode_generation(golden("generation_first")) == GENERATION
    assert decode_generation(golden("generation_second")) == SUCCESSOR


def test_journal_entry() -> None:
    """An UNDO's entry: the meta from before it, and what the block had done."""
    entry = journal.decode_entry(golden("journal_entry"))

    assert entry.header.kind is Kind.UNDO
    assert entry.header.frame_id == IDS[2]
    assert entry.before.tip.root == ROOTS[1]
    assert (entry.before.seq, entry.before.walk, entry.before.tip.ref) == (2, 2, APPLY_1.ref)
    assert entry.diff().inverted().tables[1].changes() == CHANGES


def test_range_diff() -> None:
    """The first two blocks as one: what was created in the first and changed in the second was created so."""
    piece = Piece.of_bytes(golden("range"))
    (chunk,) = piece.chunks()

    assert (piece.head.first, piece.head.last, piece.head.parent) == (0, 1, NO_PARENT)
    assert (piece.head.piece, piece.head.is_last) == (1, True)
    assert piece.resume == resume_record(journal.decode_entry(golden("journal_entry")).before)
    assert piece.resume.tip.root == ROOTS[1]
    assert chunk.changes() == [
        Change(coin(1), None, b"one" + COIN),
        Change(coin(1, 1, 2), None, b""),
        Change(coin(2), None, COIN),
        Change(coin(3), None, COIN),
    ]


@pytest.mark.parametrize(
    ("name", "filters"), [("segment", None), ("segment_with_filters", [8, 8]), ("segment_frames_last", [8, 8])]
)
def test_segments(name: str, filters: list[int] | None) -> None:
    """The first two blocks archived, as before there were filters, with them, and with frames last; whole and by
    ranges."""
    data = golden(name)
    segment = Segment.open(data)
    index = SegmentIndex.read(
        SegmentName("walk", GENERATION.generation, 0, 0, 1),
        len(data),
        lambda start, stop: data[start:stop],
        with_filters=True,
    )

    assert [entry[:3] for entry in segment.entries] == [(ref(at), IDS[at], ROOTS[at]) for at in range(2)]
    assert segment.frame_at(1) == data[slice(*index.place(index.entries[1]))]
    assert frame.peek(segment.frame_at(1)) == frame.peek(golden("frame_apply_1_whole"))
    assert (index.entries, index.resume) == (segment.entries, segment.resume)
    assert (index.filters and list(map(len, index.filters))) == filters
    if filters:
        assert [index.may_hold(UTXO, coin(number)) for number in (2, 3, 4)] == [
            [index.entries[0]],
            [index.entries[1]],
            [],
        ]


@pytest.mark.parametrize(("name", "shards"), [("manifest", 1), ("manifest_of_shards", 2)])
def test_manifests(name: str, shards: int) -> None:
    """Three coins in three parts, of one shard and of two, under one name; the bytes are written alike."""
    manifest = decode_manifest(golden(name))
    first, last = manifest.resumes[0], manifest.resumes[-1]

    assert manifest.name == f"walk/{(b'g' * 16).hex()}/snapshots/000000000009-d2a599d9a98ef291/manifest.json"
    assert [len(manifest.parts_of(shard)) for shard in range(shards)] == ([3] if shards == 1 else [2, 1])
    assert (manifest.keys, manifest.size_bytes, manifest.tip.counts) == (3, 3003, {1: 3})
    assert (manifest.tip.ref, manifest.tip.seq, first.walk) == (BlockRef(9, b"9" * 32), 11, 12)
    assert (last.shard, last.shards, last.epoch, last.diffs.next_offset) == (shards - 1, shards, shards, 19 + shards)
    assert encode_manifest(manifest) == golden(name)


def test_signed_manifest() -> None:
    """The same manifest under the same name, with a signature that is right, beside the digest."""
    manifest, bare = decode_manifest(golden("manifest_signed")), decode_manifest(golden("manifest"))

    assert (manifest.name, manifest.digest) == (bare.name, bare.digest)
    assert replace(manifest, signature=None) == bare
    check_signature(
        manifest.signature,
        manifest.digest,
        bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"),
        "golden",
    )
    assert encode_manifest(manifest) == golden("manifest_signed")


def test_meta_and_stored_entries() -> None:
    """A store's position, and the entries that it stands for: one of them a bucket of two."""
    meta = decode_meta(golden("meta"))
    data, parts = golden("stored"), []
    while data:
        size = int.from_bytes(data[:4], "little")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    entries = list(zip(parts[::2], parts[1::2], strict=True))

    assert meta == Meta(
        chain_id="walk",
        generation=b"g" * 16,
        finality=6,
        tip=replace(meta.tip, ref=ref(0), seq=1, counts={1: 4}),
        walk=3,
        highest=1,
        seq=3,
        frame_id=IDS[2],
        epoch=1,
        writer=b"w" * 16,
        source_epoch=1,
        source_writer=b"s" * 16,
        blocks=LogMark(next_offset=4, last_digest=blake3(golden("event_rewind")).digest()),
        diffs=LogMark(next_offset=5, last_digest=blake3(golden("frame_undo_zstd")).digest()),
    )
    assert meta.tip.root == ROOTS[0]
    assert dict(entries) == held(STATE)
    assert sorted(stored[0] for _, stored in entries) == [1, 1, 2]
    check_audit(audit(iter(entries)), meta.tip)


def test_every_field_is_written_down() -> None:
    """What a MessagePack map or a frame holds stands in FORMAT.md."""
    page = (GOLDEN.parents[1] / "pipeline/FORMAT.md").read_text()
    maps = [msgpack.unpackb(golden(name)[skip:]) for name, skip in (("meta", 0), ("generation_second", 13))]
    maps += [msgpack.unpackb(golden(name)[13:]) for name, _ in EVENTS]

    assert [field for fields in maps for field in fields if f"`{field}`" not in page] == []


def test_no_golden_file_is_overwritten() -> None:
    """The script that writes them stops before it touches one that is there."""
    result = subprocess.run(
        [sys.executable, "golden/make.py", "v1"], cwd=GOLDEN.parent, capture_output=True, text=True, check=False
    )

    assert result.returncode == 1
    assert "golden files are not overwritten" in result.stderr
