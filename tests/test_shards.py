"""Shards: whatever their number, the same state; and the way of events to them, whoever splits how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from chains import expected, load_blocks, parse_chain
from hypothesis import given
from hypothesis import strategies as st
from walks import GENERATION, OPENING, STAMP, Content, Wire, Writer, content, make_walk

from pipeline import chunk
from pipeline.anchors import SLOTS, Anchor, AnchorBook, decode_anchor, encode_anchor
from pipeline.block import Connect, Event, SourceEpoch, encode_event
from pipeline.commitment.muhash import MuHash
from pipeline.errors import FrameCorrupt, LogLost, NotFound, Unsupported, UsageError, WalkGap
from pipeline.position import Meta
from pipeline.shards import SHARDS_MAX, check_shards, groups_of, join_metas, shard_of, split_block, stand_together
from pipeline.sources import coins
from pipeline.splitting import (
    CutReader,
    Kind,
    ShardEventReader,
    SplitPoint,
    Splitter,
    decode_cut,
    encode_cut,
    lowest,
    split_event,
    stood_at,
)
from pipeline.state import KEY_GROUPS, UTXO

COUNTS = (1, 2, 4, 8)


def spread_key(key: bytes) -> bytes:
    """A key of a random walk, whose first bytes are small numbers, somewhere in the key space."""
    return bytes([key[0] * 21]) * 8 + key[8:]


def spread(event: Event) -> Event:
    if not isinstance(event, Connect):
        return event
    block = event.block
    tables = {name: replace(ops, keys=list(map(spread_key, ops.keys))) for name, ops in block.tables.items()}
    return replace(event, block=replace(block, tables=tables))


WALK = [(spread(step.event), step.contents) for step in make_walk(5, 150)]
EVENTS: list[Event] = [SourceEpoch(stamp=STAMP, resume_walk=1), *(event for event, _ in WALK)]


def writers(shards: int) -> list[Writer]:
    generation = replace(GENERATION, shards=shards)
    made = []
    for shard in range(shards):
        writer = Writer(Wire(replace(OPENING, generation=generation, shard=shard)))
        writer.start()
        made.append(writer)
    return made


def run(events: list[Event], shards: int) -> tuple[list[Writer], dict[int, Meta]]:
    """Every shard's primary over all events; the joined position after every frame, by its seq."""
    nodes = writers(shards)
    joined: dict[int, Meta] = {}
    for offset, event in enumerate(events):
        for node, part in zip(nodes, split_event(event, shards), strict=True):
            node.propose(part, offset)
        while any(node.next < len(node.wire.records) for node in nodes):
            for node in nodes:
                before = node.meta.seq
                while node.next < len(node.wire.records) and node.meta.seq == before:
                    node.follow(1)
            meta = join_metas([node.meta for node in nodes])
            joined[meta.seq] = meta
        for node in nodes:
            node.replica.commit()
    return nodes, joined


def held(nodes: list[Writer]) -> Content:
    found: dict[bytes, bytes] = {}
    for node in nodes:
        mine = content(node.store)
        assert all(shard_of(place, node.meta.shards) == node.meta.shard for place, _ in node.store.scan())
        assert not mine.keys() & found.keys()
        found |= mine
    return found


@pytest.fixture(scope="module")
def alone() -> dict[int, Meta]:
    return run(EVENTS, 1)[1]


@pytest.mark.parametrize("shards", [2, 4, 16])
def test_a_walk_in_shards(shards: int, alone: Mapping[int, Meta]) -> None:
    """Position, root and counts after every frame are those of one shard; so is what all of them hold."""
    nodes, joined = run(EVENTS, shards)

    assert joined.keys() == alone.keys()
    for seq, meta in alone.items():
        found = joined[seq]
        assert (found.tip, found.walk, found.final_height) == (meta.tip, meta.walk, meta.final_height)
        assert found.tip.root == meta.tip.root
    assert held(nodes) == {spread_key(key): value for key, value in WALK[-1][1][-1].items()}
    assert sum(len(content(node.store)) > 0 for node in nodes) > min(shards, 8) // 2


@pytest.mark.parametrize("shards", COUNTS)
def test_real_blocks_in_shards(shards: int) -> None:
    """The first 600 blocks of Bitcoin: coins and MuHash are Bitcoin Core's, the root is that of one shard."""
    blocks = parse_chain(load_blocks("mainnet_0_599"))
    events = [EVENTS[0], *(Connect(stamp=STAMP, walk=walk, block=block) for walk, block in enumerate(blocks, 1))]
    nodes, joined = run(events, shards)
    muhash = MuHash()
    for key, value in held(nodes).items():
        muhash.insert(coins.element(key, value))
    entries = expected("mainnet_0_599")

    assert [joined[seq].tip.counts[1] for seq in range(1, 601)] == [entry["coins"] for entry in entries]
    assert muhash.digest()[::-1].hex() == entries[-1]["muhash"]
    assert joined[600].tip.root.hex() == "e0140eb8e20b59ae7f8b9b686980d71e6f26736e1af18d479069dde72aa00ae6"


def test_positions_that_are_not_one() -> None:
    """Shards at different blocks, or not all of them, have no position together."""
    first, second = (node.meta for node in run(EVENTS[:9], 2)[0])
    behind = run(EVENTS[:8], 2)[0][1].meta

    assert stand_together([first, second]) and not stand_together([first, behind])
    for metas in ([first, behind], [first], [second], [second, first]):
        with pytest.raises(NotFound):
            join_metas(metas)


@pytest.mark.parametrize("shards", [*COUNTS, 16, 32, SHARDS_MAX])
def test_key_groups(shards: int) -> None:
    """Each key group is one shard's, in contiguous runs."""
    assert check_shards(shards) == shards
    assert [group for shard in range(shards) for group in groups_of(shard, shards)] == list(range(KEY_GROUPS))
    for shard in range(shards):
        assert {shard_of(group.to_bytes(2, "big"), shards) for group in groups_of(shard, shards)} == {shard}


@pytest.mark.parametrize("shards", [0, -1, 3, 6, 128])
def test_numbers_that_cannot_be(shards: int) -> None:
    with pytest.raises(UsageError, match=f"cannot have {shards} shards"):
        check_shards(shards)


@given(st.data())
def test_split_block(data: st.DataObject) -> None:
    """Every op goes to the shard of its key, in order, with its value; nothing is lost."""
    event = next(event for event, _ in WALK[data.draw(st.integers(0, 40)) :] if isinstance(event, Connect))
    shards = data.draw(st.sampled_from(COUNTS))
    found = []
    for shard, part in enumerate(split_block(event.block, shards)):
        assert replace(part, tables={}) == replace(event.block, tables={})
        for ops in part.tables.values():
            assert {shard_of(place, shards) for place in UTXO.storage_keys(ops.keys)} == {shard}
            values = iter(ops.values)
            found += [
                (key, code, None if code == 2 else next(values)) for code, key in zip(ops.codes, ops.keys, strict=True)
            ]
            assert next(values, None) is None
    ops = event.block.tables["utxo"]
    values = iter(ops.values)
    wanted = [(key, code, None if code == 2 else next(values)) for code, key in zip(ops.codes, ops.keys, strict=True)]

    assert sorted(found, key=lambda op: op[0]) == sorted(wanted, key=lambda op: op[0])


# Splitting


def blocks_topic(random: Random, count: int = 40) -> list[bytes]:
    """Records of `blocks`: small events whole, others in chunks with void records between, some garbage."""
    records: list[bytes] = []
    for event in EVENTS[:count]:
        message, stamp = encode_event(event), event.stamp
        number = 0 if isinstance(event, SourceEpoch) else event.walk
        cut = chunk.cut(
            message,
            generation=stamp.generation,
            epoch=stamp.epoch,
            writer=stamp.writer,
            number=number,
            record_bytes_max=random.choice((200, 400, 1 << 20)),
        )
        for record in cut:
            records.append(record)
            if random.random() < 0.1:
                records.append(strange_chunk(random, message))
        if random.random() < 0.05:
            records.append(random.randbytes(30))
    return records


def strange_chunk(random: Random, message: bytes) -> bytes:
    """Of a writer who is not in force."""
    big = message + random.randbytes(400)
    return random.choice(
        chunk.cut(big, generation=STAMP.generation, epoch=1, writer=b"x" * 16, number=7, record_bytes_max=300)
    )


def split(records: list[bytes], shards: int, at: SplitPoint | None = None) -> list[list[bytes]]:
    """What one splitter writes that reads from a point to the end, a partition a shard."""
    splitter = Splitter(GENERATION.generation, shards, at or SplitPoint())
    partitions: list[list[bytes]] = [[] for _ in range(shards)]
    for offset in range(splitter.at.next_offset, len(records)):
        for partition, made in zip(partitions, splitter.feed(records[offset], offset), strict=True):
            partition += made
    return partitions


def events_in(partition: list[bytes], shard: int, shards: int) -> list[tuple[int, Kind, bytes]]:
    reader = CutReader(GENERATION.generation, shard, shards)
    cuts = [reader.feed(record, offset) for offset, record in enumerate(partition)]
    assert reader.held_bytes == 0
    return [(cut.last, cut.kind, cut.payload) for cut in cuts if cut is not None]


def end_of(partition: list[bytes], shard: int, shards: int) -> SplitPoint:
    """What a splitter that starts finds at the end of a partition."""
    reader = CutReader(GENERATION.generation, shard, shards, links=False)
    point = SplitPoint()
    for offset, record in enumerate(partition):
        cut = reader.feed(record, offset)
        point = point if cut is None else SplitPoint.after(cut)
    return point


@pytest.fixture
def small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shard events of a few hundred bytes go out in chunks."""
    monkeypatch.setattr(chunk.cut, "__kwdefaults__", {"record_bytes_max": 260})


@pytest.mark.usefixtures("small_records")
@pytest.mark.parametrize("seed", range(30))
def test_splitters_one_after_another_and_at_once(seed: int) -> None:
    """Splitters die anywhere, start where the partitions end, and write into one another: every shard reads every
    event once, in order, as if one splitter had written them in one go."""
    random = Random(seed)
    shards = random.choice((2, 4))
    records = blocks_topic(random)
    undisturbed = split(records, shards)
    partitions: list[list[bytes]] = [[] for _ in range(shards)]
    sleepers: list[list[list[bytes]]] = []
    for _ in range(6):
        at = lowest(end_of(partition, shard, shards) for shard, partition in enumerate(partitions))
        written = split(records, shards, at)
        for shard, made in enumerate(written):
            stop = random.randrange(len(made) + 1)
            mine, later = made[:stop], made[stop:]
            asleep = [sleeper[shard] for sleeper in sleepers]
            partitions[shard] += woven(random, [mine, *(one[: random.randrange(len(one) + 1)] for one in asleep)])
            written[shard] = later
        if random.random() < 0.5:
            sleepers = [written]  # it goes on in the middle, whatever was written meanwhile
    last = split(records, shards, lowest(end_of(one, shard, shards) for shard, one in enumerate(partitions)))
    for shard in range(shards):
        partitions[shard] += last[shard]

        assert events_in(partitions[shard], shard, shards) == events_in(undisturbed[shard], shard, shards)


def woven(random: Random, writers: list[list[bytes]]) -> list[bytes]:
    """Records of several writers, each in its order."""
    left = [list(one) for one in writers if one]
    records = []
    while left:
        one = random.choice(left)
        records.append(one.pop(0))
        left = [one for one in left if one]
    return records


@pytest.mark.parametrize("seed", range(10))
def test_split_events_are_the_events(seed: int) -> None:
    """A shard's reader gives the events that a reader of blocks gives, with the shard's ops; garbage is garbage."""
    random = Random(seed)
    records = blocks_topic(random)
    for shard, partition in enumerate(split(records, 2)):
        reader, bad, events = ShardEventReader(GENERATION.generation, shard, 2), 0, []
        for offset, record in enumerate(partition):
            try:
                found = reader.feed(record, offset, (0, bytes(16)))
            except Exception as error:
                assert "is no event" in str(error)
                bad += 1
                continue
            if found is not None:
                events.append(found[0])
                assert (found[1].first, found[1].last) == (offset, offset)
        assert events == [split_event(event, 2)[shard] for event in EVENTS[:40]]
        assert bad == sum(len(record) == 30 for record in records)


def test_reading_on_behind_a_stale_repeat() -> None:
    """A reader that goes on behind an event knows what is a repeat, though it has not read it."""
    records = [encode_event(event) for event in EVENTS[:20]]
    partition = split(records, 2)[1]
    log = [*partition[:10], *partition[5:8], *partition[10:]]
    reader = CutReader(GENERATION.generation, 1, 2, after=stood_at(log[9]))
    cuts = [cut for offset in range(10, len(log)) if (cut := reader.feed(log[offset], offset)) is not None]

    assert [cut.last for cut in cuts] == list(range(10, 20))


def test_a_repeat_that_is_another_event_stops() -> None:
    """Blocks was another topic when it was split: no reader goes on."""
    partition = split([encode_event(event) for event in EVENTS[:20]], 2)[0]
    other = decode_cut(partition[5])
    assert other is not None
    reader = CutReader(GENERATION.generation, 0, 2)
    for offset, record in enumerate(partition):
        reader.feed(record, offset)

    assert reader.feed(partition[5], 20) is None
    with pytest.raises(LogLost, match="offset 5 of blocks was split twice"):
        reader.feed(encode_cut(replace(other, digest=b"d" * 32)), 21)


def test_a_lost_event_is_noticed() -> None:
    partition = split([encode_event(event) for event in EVENTS[:20]], 2)[0]
    reader = CutReader(GENERATION.generation, 0, 2)
    for offset, record in enumerate([*partition[:4], *partition[5:6]]):
        if offset < 4:
            reader.feed(record, offset)
            continue
        with pytest.raises(WalkGap, match="offset 5 of blocks follows offset 5"):
            reader.feed(record, offset)


def test_what_is_void_on_shard_blocks() -> None:
    """Garbage, damage, another generation, another shard: passed by. A later version stops the reader."""
    (good,) = split([encode_event(EVENTS[0])], 2)[0]
    cut = decode_cut(good)
    assert cut is not None and encode_cut(cut) == good
    void = (
        *(b"", b"garbage", good[:-1], good[:50], good[:70] + b"\xff" + good[71:]),
        *(encode_cut(replace(cut, shard=1)), encode_cut(replace(cut, shards=4))),
        encode_cut(replace(cut, generation=b"o" * 16)),
    )
    reader = CutReader(GENERATION.generation, 0, 2)

    assert [reader.feed(record, offset) for offset, record in enumerate(void)] == [None] * len(void)
    assert reader.feed(good, 9) == cut
    with pytest.raises(Unsupported):
        reader.feed(good[:4] + b"\x02" + good[5:], 10)


# Anchors


def test_anchors_join(alone: Mapping[int, Meta]) -> None:
    """From what each shard says of itself, in any order, follow the roots of one shard; the topic stays bounded."""
    nodes = writers(4)
    anchors: list[Anchor] = []
    for offset, event in enumerate(EVENTS):
        for node, part in zip(nodes, split_event(event, 4), strict=True):
            node.propose(part, offset)
            while node.next < len(node.wire.records):
                node.follow(1)
                anchors.append(Anchor.of(node.meta))
    Random(3).shuffle(anchors)
    book = AnchorBook(GENERATION.generation, 4)
    joined = [found for anchor in anchors if (found := book.feed(encode_anchor(anchor))) is not None]

    assert {one.tip.seq for one in joined} >= set(alone) - {0}
    for one in joined:
        assert (one.tip.root, one.tip.ref, one.walk) == (
            (alone[one.tip.seq].tip.root, alone[one.tip.seq].tip.ref, alone[one.tip.seq].walk)
            if one.tip.seq
            else (one.tip.root, None, 0)
        )
    newest = book.newest()
    assert newest is not None and newest.tip.seq == max(alone)
    assert len({anchor.key for anchor in anchors}) <= 4 * SLOTS


def test_anchors_that_do_not_stand_together() -> None:
    """A shard that says nothing of a position, or something else of it, leaves it without a root."""
    first, second = (Anchor.of(node.meta) for node in run(EVENTS[:9], 2)[0])
    assert decode_anchor(encode_anchor(first)) == first
    other_branch = replace(second, tip=replace(second.tip, ref=replace(second.tip.ref, block_hash=b"o" * 32)))  # type: ignore[type-var]
    book = AnchorBook(GENERATION.generation, 2)

    for anchor in (first, replace(second, generation=b"o" * 16), replace(second, shards=4), other_branch):
        assert book.feed(encode_anchor(anchor)) is None
    assert book.feed(b"garbage") is book.newest() is None
    joined = book.feed(encode_anchor(second))
    assert joined is not None and joined.tip.counts == {1: first.tip.counts[1] + second.tip.counts[1]}


@pytest.mark.parametrize("damage", [b"", b"SFan", b"SFan\x01" + bytes(8), b"SFan\x01" + bytes(30)])
def test_damaged_anchors(damage: bytes) -> None:
    with pytest.raises(FrameCorrupt):
        decode_anchor(damage)
