"""Write the golden files of the version that this build writes. Run from `tests`: ``python golden/make.py v1``.

Golden files are read for ever, so none is ever overwritten: to write a file again, delete it first, and only before
the release that freezes its version. `tests/test_golden.py` says what each of them holds.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from walks import GENERATION, NO_PARENT, STAMP, Wire, Writer, block, coin, ref

from pipeline import chunk, frame, journal
from pipeline.archive import LAYOUT, Section, Segment, build_segment, resume_record
from pipeline.block import BlockRef, Connect, Event, Op, Rewind, SourceEpoch, encode_event
from pipeline.codec import Codec
from pipeline.floor import EventsFloor, Floor, FramesFloor, ShardFloor, encode_floor
from pipeline.frame import Feature, Header, Kind
from pipeline.generation import Generation, encode_end, encode_generation
from pipeline.group import Step
from pipeline.parts import Part, sum_parts
from pipeline.position import LogMark, Meta, Tip
from pipeline.primary import Primary
from pipeline.signature import SigningKey
from pipeline.snapshot import Manifest, encode_manifest, make_manifest, parts_of, signed
from pipeline.squash import Lowest
from pipeline.state import UTXO
from pipeline.stores.base import META_KEY
from pipeline.stores.memory import MemoryStore
from pipeline.verify import audit

COIN = b"\x02" + bytes(60)

EVENTS: dict[str, Event] = {
    "epoch": SourceEpoch(stamp=STAMP, resume_walk=1),
    "connect_0": Connect(
        stamp=STAMP,
        walk=1,
        block=block(
            ref(0),
            NO_PARENT,
            (Op.CREATE, coin(1), b"one" + COIN),
            (Op.CREATE, coin(1, 0, 1), b"two" + COIN),
            (Op.CREATE, coin(1, 1, 2), b"three" + COIN),
            (Op.CREATE, coin(2), COIN),
        ),
    ),
    "connect_1": Connect(
        stamp=STAMP,
        walk=2,
        block=block(
            ref(1),
            ref(0).block_hash,
            (Op.DELETE, coin(1, 0, 1)),
            (Op.PUT, coin(1, 1, 2), b""),
            (Op.CREATE, coin(3), COIN),
            (Op.CREATE, coin(4), COIN),
            (Op.DELETE, coin(4)),
        ),
    ),
    "rewind": Rewind(stamp=STAMP, walk=3, to=ref(0)),
}

TAKES_BACK = Header(
    kind=Kind.EPOCH,
    codec=Codec.NONE,
    required=Feature.TAKES_BACK,
    generation=GENERATION.generation,
    epoch=3,
    writer=b"x" * 16,
    shard=1,
    shards=2,
    chain_id="walk",
    seq=7,
    walk=9,
    prev_frame_id=b"7" * 32,
    source_epoch=2,
    source_writer=b"s" * 16,
    next_input_offset=12,
    input_digest=b"d" * 32,
    table_roots={},
)

SUCCESSOR = Generation(
    generation=b"n" * 16,
    chain_id="walk",
    number=2,
    previous=GENERATION.generation,
    base=BlockRef(9, b"9" * 32),
    base_vectors={1: bytes(range(256)) * 8},
    base_counts={1: 5},
    base_manifest="walk/manifest",
)

_EVENTS_FLOOR = EventsFloor(
    ref=BlockRef(9, b"9" * 32),
    mark=LogMark(next_offset=14, last_digest=b"b" * 32),
    walk=12,
    source=(1, b"s" * 16),
)
FLOOR = Floor(
    generation=GENERATION.generation,
    ref=BlockRef(9, b"9" * 32),
    blocks=replace(_EVENTS_FLOOR, mark=LogMark(next_offset=11, last_digest=b"")),
    shards=(
        ShardFloor(
            frames=FramesFloor(mark=LogMark(next_offset=20, last_digest=b"d" * 32), epoch=2, writer=b"w" * 16),
            events=_EVENTS_FLOOR,
        ),
    )
    * 2,
)

HELD = {coin(1): b"one" + COIN, coin(2): b"two" + COIN, coin(200): COIN}
"""Keys of either half of the key space."""


def manifest(shards: int) -> Manifest:
    """A snapshot of `HELD` at block 9: a part a key."""
    entries = sorted(zip(UTXO.storage_keys(list(HELD)), HELD.items(), strict=True))
    parts = []
    for number, (at, (key, value)) in enumerate(entries):
        digest = blake3(b"part %d" % number).digest()
        parts.append(
            Part(
                name=f"part-{number:05d}-{digest[:8].hex()}.sst",
                size_bytes=1000 + number,
                digest=digest,
                keys=1,
                first_key=at,
                last_key=at,
                partials=audit([(at, UTXO.with_value(key, None, value) or b"")]).vectors,
            )
        )
    resumes = []
    for shard in range(shards):
        held = sum_parts(parts_of(parts, shard, shards))
        resumes.append(
            Meta(
                chain_id="walk",
                generation=GENERATION.generation,
                finality=6,
                shard=shard,
                shards=shards,
                tip=Tip(ref=BlockRef(9, b"9" * 32), vectors=held.vectors, seq=11, counts={1: held.keys}),
                walk=12,
                highest=15,
                seq=13,
                frame_id=b"i" * 32,
                epoch=shard + 1,
                writer=b"w" * 16,
                source_epoch=1,
                source_writer=b"s" * 16,
                blocks=LogMark(next_offset=14, last_digest=b"b" * 32),
                diffs=LogMark(next_offset=20 + shard, last_digest=b"d" * 32),
            )
        )
    return make_manifest(parts, resumes)


def steps(codec: Codec) -> tuple[Writer, list[tuple[Step, bytes]]]:
    """What a writer makes of the events: each frame's step, and its bytes on the topic."""
    writer = Writer(Wire())
    writer.start()
    writer.primary = Primary(writer.replica, codec=codec)
    found = []
    for offset, event in enumerate(EVENTS.values()):
        before = len(writer.wire.records)
        writer.propose(event, offset)
        for record in writer.wire.records[before:]:
            (outcome,) = writer.follow(1)
            found.append((outcome.step, record))  # type: ignore[union-attr]
    writer.replica.commit()
    return writer, found


def range_piece(frames: list[bytes], resume: Meta) -> bytes:
    """The range diff of the first two blocks, which is one piece."""
    with tempfile.TemporaryDirectory() as folder:
        lowest = Lowest(0, 1, Path(folder))
        lowest.add(Segment.open(build_segment(frames, resume_record(resume))))
        (path,) = lowest.write(Path(folder))
        return path.read_bytes()


def files() -> dict[str, bytes]:
    """All golden files by name."""
    made = {f"event_{name}": encode_event(event) for name, event in EVENTS.items()}
    for codec in Codec:
        for name, (_, record) in zip(("apply_0", "apply_1", "undo"), steps(codec)[1], strict=True):
            if codec is Codec.ZSTD or name == "apply_0":
                made[f"frame_{name}_{codec.name.lower()}"] = record
    writer, found = steps(Codec.ZSTD)
    made["frame_apply_1_whole"] = found[1][0].whole
    made["frame_opening"], made["frame_epoch"] = writer.wire.records[:2]
    made["frame_epoch_takes_back"] = frame.encode(TAKES_BACK, b"")
    made["frame_end"] = encode_end(SUCCESSOR, GENERATION, epoch=2, writer=b"v" * 16)
    chunks = chunk.cut(
        found[0][1], generation=GENERATION.generation, epoch=1, writer=b"w" * 16, number=1, record_bytes_max=400
    )
    made |= {f"chunk_{index}": record for index, record in enumerate(chunks)}
    made["generation_first"] = encode_generation(GENERATION)
    made["generation_second"] = encode_generation(SUCCESSOR)
    made["floor"] = encode_floor(FLOOR)
    made["manifest"] = encode_manifest(manifest(1))
    made["manifest_of_shards"] = encode_manifest(manifest(2))
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    made["manifest_signed"] = encode_manifest(signed(manifest(1), key))
    store = writer.store
    assert isinstance(store, MemoryStore)
    made["journal_entry"] = store.undo[journal.entry_key(3)]
    made["meta"] = store.meta[META_KEY]
    made["range"] = range_piece(
        [step.whole for step, _ in found[:2]], journal.decode_entry(made["journal_entry"]).before
    )
    segment = build_segment(
        [step.whole for step, _ in found[:2]], resume_record(journal.decode_entry(made["journal_entry"]).before)
    )
    made["segment_frames_last"] = segment
    places = LAYOUT.split(segment)
    sections = {kind: segment[slice(*places[kind])] for kind in sorted(places)}
    made["segment_with_filters"] = LAYOUT.join(sections)
    sections.pop(Section.FILTERS)
    made["segment"] = LAYOUT.join(sections)
    made["stored"] = b"".join(
        len(part).to_bytes(4, "little") + part for entry in sorted(store.state.items()) for part in entry
    )
    return made


def main(version: str) -> None:
    folder = Path(__file__).parent / version
    made = files()
    standing = [name for name in made if (folder / f"{name}.bin").exists()]
    if standing:
        sys.exit(f"{folder} holds {standing[0]}.bin already: golden files are not overwritten")
    folder.mkdir(exist_ok=True)
    for name, data in made.items():
        (folder / f"{name}.bin").write_bytes(data)
    print(f"{len(made)} files in {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
