"""The follower and the writer: each row of the rule, and one invariant over random walks.

A node holds what the model says at its position; equal positions have equal state, journal and meta, byte by byte.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from walks import (
    FINALITY,
    GENERATION,
    NO_PARENT,
    STAMP,
    Chain,
    Content,
    Driven,
    Node,
    Step,
    Wire,
    Writer,
    block,
    coin,
    content,
    drive,
    make_walk,
    ref,
)

from pipeline import chunk, frame, journal
from pipeline.block import Connect, Op, Rewind, SourceEpoch
from pipeline.codec import Codec
from pipeline.diff import decode_whole_body, join_tables
from pipeline.errors import (
    ApplyConflict,
    Fenced,
    FrameCorrupt,
    FrameIdMismatch,
    LogLost,
    RewindTooDeep,
    RootMismatch,
    SeqConflict,
    SeqGap,
    StateferryError,
    Unsupported,
    WrongChain,
)
from pipeline.frame import Feature, Header, Kind
from pipeline.frame_reader import Ended, Partial, Reign, Repeat, Void
from pipeline.generation import Generation, Opening, encode_end, encode_opening
from pipeline.position import decode_meta
from pipeline.primary import epoch_frame
from pipeline.replica import Applied
from pipeline.stores.base import META_KEY
from pipeline.stores.memory import MemoryStore
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import audit, check_audit

ONE, TWO = coin(1), coin(2)


def started(*, record_bytes_max: int = 1 << 20) -> Writer:
    """A writer in force that has connected heights 0 and 1."""
    writer = Writer(Wire())
    writer.start(record_bytes_max=record_bytes_max)
    writer.propose(SourceEpoch(stamp=STAMP, resume_walk=1), 0)
    first = block(ref(0), NO_PARENT, (Op.CREATE, ONE, b"one"))
    second = block(ref(1), ref(0).block_hash, (Op.CREATE, TWO, b"two"))
    writer.propose(Connect(stamp=STAMP, walk=1, block=first), 1)
    writer.propose(Connect(stamp=STAMP, walk=2, block=second), 2)
    writer.follow_and_commit()
    return writer


THIRD = Connect(
    stamp=STAMP,
    walk=3,
    block=block(ref(2), ref(1).block_hash, (Op.DELETE, ONE), (Op.PUT, TWO, b"2"), (Op.CREATE, coin(3), b"3")),
)
UNDO = Rewind(stamp=STAMP, walk=3, to=ref(0))


def next_record(event: Connect | Rewind = THIRD) -> bytes:
    """The frame that a writer proposes on top of `started`."""
    writer = started()
    writer.propose(event, 3)
    return writer.wire.records[-1]


NEXT, NEXT_UNDO = next_record(), next_record(UNDO)
LAST = started().wire.records[-1]


def patched(record: bytes, at: int, new: bytes) -> bytes:
    data = record[:at] + new + record[at + len(new) : -16]
    return data + xxhash.xxh3_128_digest(data)


def claiming(record: bytes, **changes: Any) -> bytes:
    """The same frame with other claims; its id is not recomputed."""
    decoded = frame.decode(record)
    return frame.encode(replace(decoded.header, **changes), decoded.body)


def self_contained() -> bytes:
    writer = started()
    writer.propose(THIRD, 3)
    (step,) = applied_steps(writer)
    return step.whole


def applied_steps(writer: Writer) -> list[Any]:
    return [outcome.step for outcome in writer.follow() if isinstance(outcome, Applied)]


def with_body(body: bytes) -> bytes:
    return frame.encode(frame.decode(NEXT).header, body)


def unnumbered(kind: Kind, epoch: int, **changes: Any) -> bytes:
    header = Header(
        kind=kind,
        codec=Codec.NONE,
        generation=GENERATION.generation,
        epoch=epoch,
        writer=b"v" * 16,
        chain_id="walk",
        table_roots={},
    )
    return frame.encode(replace(header, **changes), b"")


SUCCESSOR = Generation(generation=b"n" * 16, chain_id="walk", number=2, previous=GENERATION.generation)
END = encode_end(SUCCESSOR, GENERATION, epoch=2, writer=b"v" * 16)
CHUNK = chunk.cut(
    NEXT, generation=GENERATION.generation, epoch=1, writer=b"w" * 16, number=3, record_bytes_max=len(NEXT) - 1
)
OTHERS_CHUNK = chunk.cut(
    NEXT, generation=GENERATION.generation, epoch=1, writer=b"x" * 16, number=3, record_bytes_max=len(NEXT) - 1
)
STRANGE_CHUNK = chunk.cut(
    NEXT, generation=b"o" * 16, epoch=1, writer=b"w" * 16, number=3, record_bytes_max=len(NEXT) - 1
)

VOIDS = [
    ("nothing", b"", "damaged"),
    ("garbage", b"garbage" * 99, "damaged"),
    ("cut", NEXT[:-1], "damaged"),
    ("flipped", NEXT[:200] + bytes([NEXT[200] ^ 1]) + NEXT[201:], "damaged"),
    ("another generation", claiming(NEXT, generation=b"o" * 16), "generation"),
    ("another generation's EPOCH", unnumbered(Kind.EPOCH, 2, generation=b"o" * 16), "generation"),
    ("another shard", claiming(NEXT, shards=2), "shard"),
    ("another writer", claiming(NEXT, writer=b"x" * 16), "writer"),
    ("an epoch to come", claiming(NEXT, epoch=2), "writer"),
    ("another writer's, of an unknown version", patched(claiming(NEXT, writer=b"x" * 16), 4, b"\x09"), "writer"),
    ("the EPOCH in force again", unnumbered(Kind.EPOCH, 1), "epoch"),
    ("an EPOCH too far", unnumbered(Kind.EPOCH, 3), "epoch"),
    ("the opening again", encode_opening(Wire().opening), "epoch"),
    ("an end too far", unnumbered(Kind.GENERATION, 3), "epoch"),
    ("a damaged chunk", CHUNK[0][:-1] + b"\0", "damaged"),
    ("another writer's chunk", OTHERS_CHUNK[0], "writer"),
    ("another generation's chunk", STRANGE_CHUNK[0], "generation"),
]


@pytest.mark.parametrize(("record", "reason"), [row[1:] for row in VOIDS], ids=[row[0] for row in VOIDS])
def test_void_changes_nothing(record: bytes, reason: str) -> None:
    """A void record is counted and passed by: the next one finds everything as it was."""
    writer = started()
    node = Node(writer.wire)
    node.follow_and_commit()
    meta, held = node.meta, dict(node.store.meta)  # type: ignore[attr-defined]

    assert node.replica.step(record, 9) == Void(reason=reason)
    assert node.replica.reader.voids == {reason: 1}
    node.replica.commit()
    assert node.meta == meta
    assert node.store.meta == held  # type: ignore[attr-defined]
    assert isinstance(node.replica.step(NEXT, 10), Applied)
    assert writer.take(record, 9) == Void(reason=reason)


STOPS: list[tuple[str, bytes, type[StateferryError], str]] = [
    ("unknown version", patched(NEXT, 4, b"\x02"), Unsupported, "version 2"),
    ("unknown feature", patched(NEXT, 8, b"\x04"), Unsupported, "unknown features"),
    ("unknown kind", patched(NEXT, 6, b"\x09"), Unsupported, "kind 9"),
    ("EPOCH of an unknown version", patched(unnumbered(Kind.EPOCH, 2), 4, b"\x02"), Unsupported, "version 2"),
    ("impossible header", patched(NEXT, 92, bytes(8)), FrameCorrupt, "without seq"),
    ("undecodable body", with_body(b"\x01"), FrameCorrupt, "head"),
    ("wrong op count", claiming(NEXT, op_count=4), FrameCorrupt, "announces 4 changes and has 3"),
    ("another chain", claiming(NEXT, chain_id="other"), WrongChain, "'other'"),
    ("one missing", claiming(NEXT, seq=4), SeqGap, "1 are missing"),
    ("many missing", claiming(NEXT, seq=99), SeqGap, "96 are missing"),
    ("another id at the last seq", claiming(LAST, frame_id=bytes(32)), SeqConflict, "two frames have seq 2"),
    ("another link", claiming(NEXT, prev_frame_id=bytes(32)), SeqConflict, "links to another frame"),
    ("another root before", claiming(NEXT, prev_root=bytes(32)), RootMismatch, "starts from root"),
    ("another parent", claiming(NEXT, parent_hash=bytes(32)), SeqConflict, "does not meet the tip"),
    ("another height", claiming(NEXT, ref=ref(3)), SeqConflict, "does not meet the tip"),
    ("an UNDO of another block", claiming(NEXT_UNDO, ref=ref(1, "'")), SeqConflict, "does not meet the tip"),
    ("another root after", claiming(NEXT, post_root=bytes(32)), RootMismatch, "is claimed"),
    ("another table root", claiming(NEXT, table_roots={1: bytes(32)}), RootMismatch, "table roots"),
    ("another id", claiming(NEXT, frame_id=bytes(32)), FrameIdMismatch, "is claimed"),
    ("an UNDO with another root", claiming(NEXT_UNDO, post_root=bytes(32)), RootMismatch, "is claimed"),
    ("an UNDO with another id", claiming(NEXT_UNDO, frame_id=bytes(32)), FrameIdMismatch, "is claimed"),
    ("references without exceptions", with_body(join_tables({1: b""})), FrameCorrupt, "announced"),
]


@pytest.mark.parametrize(("record", "error", "message"), [row[1:] for row in STOPS], ids=[row[0] for row in STOPS])
def test_bad_frame_in_force_stops(record: bytes, error: type[StateferryError], message: str) -> None:
    """What is in force and cannot be followed stops the reader by its name, and nothing of it is kept."""
    node = Node(started().wire)
    node.follow_and_commit()
    meta = node.meta

    for _ in range(2):
        with pytest.raises(error, match=message):
            node.replica.step(record, 9)
    assert node.meta == meta
    assert node.replica.group_bytes == node.replica.group_length == 0
    assert isinstance(node.replica.step(NEXT, 10), Applied)


def test_frame_on_another_state_is_a_conflict() -> None:
    """A store whose content is not what its position says meets a reference that names nothing."""
    node = Node(started().wire)
    node.follow_and_commit()
    node.store.state.clear()  # type: ignore[attr-defined]

    with pytest.raises(ApplyConflict, match="names no single key"):
        node.replica.step(NEXT, 9)


def test_unknown_chunk_in_force_stops() -> None:
    """A chunk of an unknown version is no gap: this build cannot read its writer."""
    head = CHUNK[0][:4] + b"\x02" + CHUNK[0][5:-8]
    node = Node(started().wire)
    node.follow_and_commit()

    with pytest.raises(Unsupported, match="chunk of version 2"):
        node.replica.step(head + xxhash.xxh3_64_digest(head), 9)


@pytest.mark.parametrize("record", [NEXT, self_contained()], ids=["references", "whole"])
def test_both_forms_are_followed(record: bytes) -> None:
    """A frame in whole form needs no references and leads to the same place, with the same id and journal."""
    node, other = (Node(started().wire) for _ in range(2))
    for one, data in ((node, NEXT), (other, record)):
        one.follow_and_commit()
        assert isinstance(one.replica.step(data, 5), Applied)
        one.replica.commit()

    assert content(other.store) == {TWO: b"2", coin(3): b"3"}
    assert other.store.state == node.store.state  # type: ignore[attr-defined]
    assert other.meta.frame_id == node.meta.frame_id
    assert other.meta.tip == node.meta.tip


def test_repeats_pass_by() -> None:
    """The last frame again, and any before it, are repeats, to replica and writer."""
    writer = started()
    node = Node(writer.wire)
    node.follow_and_commit()
    meta = node.meta

    for record, seq in ((writer.wire.records[-1], 2), (writer.wire.records[-2], 1)):
        assert node.replica.step(record, 9) == writer.take(record, 9) == Repeat(seq=seq)
    assert node.meta == meta


def test_chunked_frame_applies_at_its_last_chunk() -> None:
    """Chunks are partial until the last; the offset stored is past it, and void records between do no harm."""
    node = Node(started().wire)
    node.follow_and_commit()

    assert node.replica.step(CHUNK[0], 4) == Partial()
    assert node.replica.reader.held_bytes > 0
    assert isinstance(node.replica.step(OTHERS_CHUNK[0], 5), Void)
    assert isinstance(node.replica.step(CHUNK[1], 6), Applied)
    assert node.replica.reader.held_bytes == 0
    assert node.meta.diffs.next_offset == 7


@pytest.mark.parametrize("between", [LAST, unnumbered(Kind.EPOCH, 2)], ids=["frame", "epoch"])
def test_message_in_force_discards_incomplete_chunks(between: bytes) -> None:
    """After a frame in force or a valid EPOCH the rest of a chunked frame leads nowhere, for every reader."""
    node = Node(started().wire)
    node.follow_and_commit()
    node.replica.step(CHUNK[0], 4)
    node.replica.step(between, 5)

    assert node.replica.reader.held_bytes == 0
    assert isinstance(node.replica.step(CHUNK[1], 6), (Partial, Void))
    assert node.meta.seq == 2


def test_writer_forgets_incomplete_chunks_as_every_reader_does() -> None:
    """A frame that the writer knows without decoding it discards what is incomplete, too."""
    writer = started()
    writer.take(CHUNK[0], 4)
    assert writer.replica.reader.held_bytes > 0
    writer.propose(THIRD, 3)
    writer.follow()

    assert writer.replica.reader.held_bytes == 0


def test_epoch_hands_over() -> None:
    """A valid EPOCH puts the next writer in force; it is stored, and the old writer's frames are void."""
    node = Node(started().wire)
    node.follow_and_commit()

    assert isinstance(node.replica.step(unnumbered(Kind.EPOCH, 2), 4), Reign)
    node.replica.commit()
    node.reopen()
    assert (node.meta.epoch, node.meta.writer) == (2, b"v" * 16)
    assert node.meta.diffs.next_offset == 5
    assert node.replica.step(NEXT, 5) == Void(reason="writer")
    assert isinstance(node.replica.step(claiming(NEXT, epoch=2, writer=b"v" * 16), 6), Applied)


def test_generation_ends() -> None:
    """A valid end names the successor; a writer that reads it is fenced."""
    writer = started()
    node = Node(writer.wire)
    node.follow_and_commit()

    assert node.replica.step(END, 9) == Ended(successor=SUCCESSOR)
    with pytest.raises(Fenced, match="has ended"):
        writer.take(END, 9)


def test_writer_is_fenced_by_an_epoch() -> None:
    """A writer that reads another's EPOCH stops; nothing that it proposed and did not read back has taken effect."""
    writer = started()
    before = content(writer.store)
    writer.wire.append([epoch_frame(writer.meta, b"x" * 16)])
    writer.propose(THIRD, 3)
    writer.propose(Connect(stamp=STAMP, walk=4, block=block(ref(3), ref(2).block_hash)), 4)
    node = Node(writer.wire)
    node.follow_and_commit()

    with pytest.raises(Fenced, match="in force since epoch 2"):
        writer.follow()
    writer.replica.drop_proposed()
    assert writer.replica.layers.dirty_bytes == 0
    assert content(writer.store) == content(node.store) == before
    assert node.replica.reader.voids == {"writer": 2}
    assert isinstance(Node.take(writer, writer.wire.records[writer.next], writer.next), Reign)


def test_frame_of_this_writer_that_it_did_not_propose_is_a_conflict() -> None:
    """Two processes that both believe to be one writer are found out."""
    writer = started()

    with pytest.raises(SeqConflict, match="was not proposed"):
        writer.take(NEXT, 9)


def test_dropping_proposals_keeps_what_the_log_has() -> None:
    """Accepted frames stay readable and are committed; what was only proposed is gone."""
    writer = started()
    writer.propose(THIRD, 3)
    writer.follow()
    writer.propose(Connect(stamp=STAMP, walk=4, block=block(ref(3), ref(2).block_hash, (Op.DELETE, TWO))), 4)
    writer.replica.drop_proposed()
    writer.replica.commit()

    assert content(writer.store) == {TWO: b"2", coin(3): b"3"}
    assert writer.replica.layers.dirty_bytes == 0


def test_failed_event_leaves_no_trace() -> None:
    """An event that is refused changes neither layers nor what comes next."""
    writer = started()
    assert writer.primary is not None
    ahead = writer.primary.ahead

    with pytest.raises(RewindTooDeep):
        deep = Writer(Wire(Opening(generation=GENERATION, finality=0)))
        deep.start()
        deep.propose(SourceEpoch(stamp=STAMP, resume_walk=1), 0)
        for height in range(3):
            parent = ref(height - 1).block_hash if height else NO_PARENT
            deep.propose(Connect(stamp=STAMP, walk=height + 1, block=block(ref(height), parent)), height + 1)
        deep.propose(Rewind(stamp=STAMP, walk=4, to=ref(1)), 4)
    with pytest.raises(StateferryError, match="already"):
        writer.propose(Connect(stamp=STAMP, walk=3, block=block(ref(2), ref(1).block_hash, (Op.CREATE, ONE, b""))), 3)
    assert writer.primary.ahead == ahead
    assert writer.replica.layers.dirty_bytes == 0
    assert len(writer.propose(THIRD, 3)) == 1


def test_offsets_of_a_rewind_lead_back_to_it_until_its_last_frame() -> None:
    """A rewind of two blocks: the first frame says to read it again, the last one to go on."""
    writer = started()
    writer.propose(THIRD, 3)
    first, last = writer.propose(Rewind(stamp=STAMP, walk=4, to=ref(0)), 4)

    assert (first.walk, first.next_input_offset, first.input_digest) == (3, 4, b"p" * 32)
    assert (last.walk, last.next_input_offset) == (4, 5)
    assert (first.ref, last.ref) == (ref(2), ref(1))


def test_rewind_read_again_goes_on_from_where_the_store_is() -> None:
    """A writer that starts between the frames of a rewind proposes only the rest of it."""
    writer = started()
    writer.propose(THIRD, 3)
    writer.propose(Rewind(stamp=STAMP, walk=4, to=ref(0)), 4)
    del writer.wire.records[-1]
    writer.follow_and_commit()
    writer.reopen()
    writer.start(b"2" * 16)

    assert writer.meta.blocks.next_offset == 4
    (rest,) = writer.propose(Rewind(stamp=STAMP, walk=4, to=ref(0)), 4)
    assert rest.ref == ref(1)
    writer.follow_and_commit()
    assert content(writer.store) == {ONE: b"one"}
    assert writer.propose(Rewind(stamp=STAMP, walk=4, to=ref(0)), 4) == []


def test_two_txids_of_one_short_key_are_spent_in_one_block() -> None:
    """What somebody made to collide, at one index or at two, is followed as anything else."""
    coins = [coin(1, index, rest) for index, rest in ((2, 0), (1, 5), (0, 7), (0, 8))]
    writer = Writer(Wire())
    writer.start()
    writer.propose(SourceEpoch(stamp=STAMP, resume_walk=1), 0)
    born = block(ref(0), NO_PARENT, *[(Op.CREATE, key, b"v") for key in coins])
    spent = block(ref(1), ref(0).block_hash, *[(Op.DELETE, key) for key in coins])
    writer.propose(Connect(stamp=STAMP, walk=1, block=born), 1)
    writer.propose(Connect(stamp=STAMP, walk=2, block=spent), 2)
    node = Node(writer.wire)
    node.follow(2)
    node.replica.commit()
    assert content(node.store) == dict.fromkeys(coins, b"v")

    node.follow_and_commit()

    assert content(node.store) == {}


def test_chain_may_begin_at_any_height() -> None:
    """Without a base the first block's height is where the journal and the archive begin."""
    driven = drive(make_walk(1, 60, first_height=1_000_000), seed=1)
    node = Node(driven.wire)
    while node.meta.seq == 0:
        node.follow(1)
    assert (node.meta.tip.height, node.meta.journal_first_height) == (1_000_000, 1_000_000)
    node.follow_and_commit()

    assert node.meta.journal_first_height == node.meta.final_height + 1
    assert node.meta.archived_to == 1_000_000
    check_equal(driven, node)


def test_unknown_input_digest_stays_unknown() -> None:
    """A frame that does not know the digest of the record before its input leaves the mark without one."""
    meta = started().meta
    header = frame.peek(NEXT)
    after = replace(header, input_digest=frame.NO_HASH)

    assert meta.after(header, meta.tip, offset=1, digest=b"").blocks.last_digest == header.input_digest
    assert meta.after(after, meta.tip, offset=1, digest=b"").blocks.last_digest == b""


# Walks


def check_equal(driven: Driven, node: Node) -> None:
    """Two nodes at one position hold the same bytes, in all three families."""
    one, two = driven.writer.store, node.store
    assert isinstance(one, MemoryStore) and isinstance(two, MemoryStore)
    assert (one.state, one.undo, one.meta) == (two.state, two.undo, two.meta)
    driven.check(node)
    check_audit(audit(node.store.scan()), node.meta.tip)
    assert node.meta.tip.counts == {1: len(content(node.store))}


def check_journal(node: Node) -> None:
    """The journal holds every seq and height that can still be taken off, and no other."""
    store, meta = node.store, node.meta
    assert isinstance(store, MemoryStore)
    seqs = range(meta.journal_first_seq, meta.seq + 1)
    heights = range(meta.journal_first_height, meta.tip.height + 1)

    assert meta.journal_first_height == meta.final_height + 1
    assert set(store.undo) == {*map(journal.entry_key, seqs), *map(journal.height_key, heights)}
    assert [node.replica.recent.header_at(height).ref.height for height in heights] == list(heights)


@pytest.mark.parametrize("seed", range(12))
def test_replica_equals_primary_equals_model(seed: int) -> None:
    """However commits are grouped and whatever is void in between: same state, same journal, same meta."""
    driven = drive(make_walk(seed, 80), seed=seed)
    driven.check(driven.writer)
    random = Random(seed)
    node, voids = Node(driven.wire), Counter[str]()
    while node.next < len(driven.wire.records):
        node.follow(random.randrange(1, 9))
        if random.random() < 0.5:
            node.replica.commit()
            driven.check(node)
        if random.random() < 0.1:
            voids += node.replica.reader.voids
            node.reopen()
    node.replica.commit()

    check_equal(driven, node)
    check_journal(node)
    assert (voids + node.replica.reader.voids).keys() >= {"damaged", "generation"}
    assert node.replica.group_bytes == node.replica.group_length == 0


@pytest.mark.parametrize("seed", range(3))
def test_every_depth_is_taken_back_and_followed_again(seed: int) -> None:
    """Taking back k frames leads to the model's state k frames ago, and following again to the same bytes."""
    driven = drive(make_walk(seed, 60), seed=seed)
    deepest = driven.writer.meta.seq - driven.writer.meta.journal_first_seq + 1
    final_height = driven.writer.meta.final_height
    assert deepest >= FINALITY
    for depth in range(1, deepest + 1):
        node = Node(driven.wire)
        node.follow_and_commit()
        for _ in range(depth):
            node.replica.take_back()
            driven.check(node)
        assert node.meta.final_height == final_height
        assert decode_meta(node.store.get_meta(META_KEY) or b"") == node.meta
        node.reopen()
        check_audit(audit(node.store.scan()), node.meta.tip)
        node.follow_and_commit()
        check_equal(driven, node)
        check_journal(node)


def test_journal_bounds_what_is_taken_back() -> None:
    """Below the journal there is nothing to take back with."""
    driven = drive(make_walk(2, 40), seed=2)
    node = driven.writer
    while node.meta.seq >= node.meta.journal_first_seq:
        node.replica.take_back()

    with pytest.raises(LogLost, match="restore"):
        node.replica.take_back()


def test_archiving_node_keeps_its_journal() -> None:
    """Entries stay until the archive has them, and go with the next commit once it has."""
    driven = drive(make_walk(3, 60), seed=3)
    node = Node(driven.wire, archives=True)
    node.follow_and_commit()
    first = node.meta.journal_first_height
    assert first == 0
    whole = [decode_whole_body(frame.decode(journal_frame(node, height)).body) for height in range(first, 5)]
    assert sum(diff.op_count for diff in whole) > 0

    node.replica.archived(node.meta.final_height + 1)
    node.replica.commit()

    check_journal(node)


def journal_frame(node: Node, height: int) -> bytes:
    seq = node.replica.recent.seq_at(height)
    assert seq is not None
    data = node.store.get_undo(journal.entry_key(seq))
    assert data is not None
    entry = journal.decode_entry(data)
    assert Feature.SELF_CONTAINED in entry.header.required
    assert entry.header.ref.height == height
    return entry.frame_bytes


@pytest.mark.parametrize("seed", range(3))
def test_rocksdb_follows_as_memory_does(seed: int, tmp_path: Path) -> None:
    """The same walk over RocksDB, as writer and as replica, ends in the same bytes, also taken back and reopened."""
    steps = make_walk(seed, 60)
    model = drive(steps, seed=seed)
    driven = drive(steps, seed=seed, store=RocksStore(tmp_path / "writer"))
    node = Node(driven.wire, RocksStore(tmp_path / "node"))
    node.follow_and_commit()
    for _ in range(3):
        node.replica.take_back()
        driven.check(node)
    node.store.close()
    node.store = RocksStore(tmp_path / "node")
    node.reopen()
    node.follow_and_commit()
    check_audit(audit(node.store.scan()), node.meta.tip)
    memory = model.writer.store
    assert isinstance(memory, MemoryStore)

    for store in (driven.writer.store, node.store):
        assert list(store.scan()) == sorted(memory.state.items())
        assert {key: store.get_undo(key) for key in memory.undo} == memory.undo
        assert store.get_meta(META_KEY) == memory.meta[META_KEY]
        store.close()
    shutil.rmtree(tmp_path)


class FerryMachine(RuleBasedStateMachine):
    """Two nodes on one log, either may write; the log may lose its end. The one invariant: node equals model."""

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire()
        self.expected: dict[bytes, Content] = {frame.NO_HASH: {}}
        self.steps: list[Step] = []
        self.nodes = [Writer(self.wire), Writer(self.wire)]
        self.in_force: Writer | None = None
        self.reading = 0  # offset of the next event for the writer in force
        self.writers = 0

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        self.random = Random(seed)
        self.chain = Chain(random=self.random, ops_max=6)
        self.take_over(0)
        self.extend(6)

    @rule(which=st.integers(0, 1))
    def take_over(self, which: int) -> None:
        """A node starts as the writer; the other one, if it was, is not told."""
        node = self.nodes[which]
        node.reopen()
        self.writers += 1
        node.start(self.writers.to_bytes(16, "big"))
        self.in_force = node
        self.reading = node.meta.blocks.next_offset
        if self.reading == 0:
            node.propose(SourceEpoch(stamp=STAMP, resume_walk=1), 0)
            self.reading = 1

    @rule(count=st.integers(1, 8))
    def extend(self, count: int) -> None:
        """The source walks on, and the writer in force proposes what it reads."""
        self.steps += [self.chain.step() for _ in range(count)]
        self.propose(count)

    @rule(count=st.integers(1, 4))
    def propose(self, count: int) -> None:
        writer = self.in_force
        if writer is None or writer.primary is None:
            return
        for offset in range(self.reading, min(self.reading + count, len(self.steps) + 1)):
            step = self.steps[offset - 1]
            headers = writer.propose(step.event, offset, litter=self.random)
            rest = step.contents[len(step.contents) - len(headers) :]
            for header, held in zip(headers, rest, strict=True):
                assert self.expected.setdefault(header.frame_id, held) == held
            self.reading = offset + 1

    @rule(which=st.integers(0, 1), count=st.integers(1, 9), commit=st.booleans())
    def follow(self, which: int, count: int, commit: bool) -> None:
        node = self.nodes[which]
        try:
            node.follow(count)
        except Fenced:
            assert node is not self.in_force
            node.replica.drop_proposed()
            node.primary = None
            node.reopen()
        if commit:
            node.replica.commit()

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        """A node is killed: only its store is left, and it follows."""
        node = self.nodes[which]
        node.primary = None
        node.reopen()

    @precondition(lambda self: len(self.wire.records) > 8)
    @rule(lost=st.integers(1, 12))
    def lose_end(self, lost: int) -> None:
        """The log loses acknowledged records. Every node goes back to the last record that is still there, or, where
        its journal does not reach, begins anew."""
        del self.wire.records[max(2, len(self.wire.records) - lost) :]
        self.in_force = None
        for node in self.nodes:
            node.primary = None
            node.reopen()
            try:
                while not self.is_on_log(node):
                    node.replica.take_back()
            except LogLost:
                node.store = MemoryStore()
            node.reopen()

    def is_on_log(self, node: Writer) -> bool:
        mark = node.meta.diffs
        records = self.wire.records
        return mark.next_offset <= len(records) and frame.digest_of(records[mark.next_offset - 1]) == mark.last_digest

    @invariant()
    def every_store_holds_what_the_model_says(self) -> None:
        for node in self.nodes:
            data = node.store.get_meta(META_KEY)
            meta = self.wire.meta() if data is None else decode_meta(data)
            assert content(node.store) == self.expected[meta.frame_id]
            check_audit(audit(node.store.scan()), meta.tip)

    def teardown(self) -> None:
        if not self.steps:
            return
        self.take_over(0)
        self.propose(len(self.steps) + 1)
        for node in self.nodes:
            node.primary = None
            node.reopen()
            node.follow_and_commit()
        one, two = self.nodes
        assert content(one.store) == self.steps[-1].contents[-1]
        assert (one.store.state, one.store.undo) == (two.store.state, two.store.undo)  # type: ignore[attr-defined]
        assert one.meta == two.meta
        check_journal(one)


FerryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFerry = FerryMachine.TestCase
