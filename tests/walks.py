"""Random walks of a chain, their model, and nodes that follow a list as the log.

`make_walk(seed, count)` gives events and what the state is after every block, in a dict. Keys meet on purpose: many
share the 8 bytes of a short key, some of those at one output index (a bucket), some at another. `Wire` is the log.
`Node` is a replica on it, `Writer` a node that also proposes. `Wire.litter` adds records that no reader may follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

from pipeline import frame
from pipeline.archive import Committed, build_segment
from pipeline.block import Block, BlockRef, Connect, Event, Op, Ops, Rewind, SourceEpoch, SourceStamp, encode_event
from pipeline.codec import Codec
from pipeline.frame_reader import Reign
from pipeline.generation import Generation, Opening, encode_opening
from pipeline.position import Meta, decode_meta
from pipeline.primary import Primary, Reading, epoch_frame
from pipeline.replica import Outcome, Replica
from pipeline.state import schema_of_storage_key
from pipeline.stores.base import META_KEY, Store
from pipeline.stores.memory import MemoryStore

FINALITY = 6
RECORD_BYTES_MAX = 600
"""So small that many frames go out in chunks."""

GENERATION = Generation(generation=b"g" * 16, chain_id="walk")
OPENING = Opening(generation=GENERATION, finality=FINALITY)
STAMP = SourceStamp(chain_id="walk", generation=GENERATION.generation, epoch=1, writer=b"s" * 16)
NO_PARENT = bytes(32)

Content = Mapping[bytes, bytes]


def txid(number: int, rest: int = 0) -> bytes:
    """Two txids of one number share the 8 bytes that a short key keeps."""
    return bytes([number]) * 8 + bytes([rest]) * 24


def coin(number: int, index: int = 0, rest: int = 0) -> bytes:
    """A whole key of `utxo`."""
    return txid(number, rest) + index.to_bytes(4, "big")


def ref(height: int, branch: str = "") -> BlockRef:
    return BlockRef(height, f"{height}{branch}".encode().ljust(32, b"."))


def block(at: BlockRef, parent: bytes, *ops: tuple[Op, bytes] | tuple[Op, bytes, bytes]) -> Block:
    """A block of `utxo` ops: (op, key) or (op, key, value)."""
    columns = Ops(
        codes=bytes(op[0] for op in ops),
        keys=[op[1] for op in ops],
        values=[op[2] for op in ops if len(op) == 3],
    )
    return Block(ref=at, parent_hash=parent, time_s=1_600_000_000 + at.height, tables={"utxo": columns})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One event, and the content after each frame that follows from it."""

    event: Event
    contents: list[Content]


@dataclass(slots=True, kw_only=True)
class Chain:
    """The model: a branch of blocks with the content after each, and the events that led there."""

    random: Random
    first_height: int = 0
    finality: int = FINALITY
    ops_max: int = 12
    branch: list[BlockRef] = field(default_factory=list)
    contents: list[Content] = field(default_factory=lambda: [{}])
    highest: int = -1
    walk: int = 0

    def step(self) -> Step:
        """A rewind now and then, where finality allows one; else a block."""
        depth_max = min(
            len(self.branch) - 1, 4, len(self.branch) - 1 + self.first_height - self.highest + self.finality
        )
        if depth_max > 0 and self.random.random() < 0.2:
            return self.rewind(self.random.randint(1, depth_max))
        return self.connect()

    def rewind(self, depth: int) -> Step:
        self.walk += 1
        contents = self.contents[-2 : -depth - 2 : -1]
        del self.branch[-depth:], self.contents[-depth:]
        return Step(event=Rewind(stamp=STAMP, walk=self.walk, to=self.branch[-1]), contents=contents)

    def connect(self) -> Step:
        self.walk += 1
        content = dict(self.contents[-1])
        ops = [self._op(content) for _ in range(self.random.randrange(self.ops_max))]
        at = BlockRef(self.first_height + len(self.branch), self.random.randbytes(32))
        parent = self.branch[-1].block_hash if self.branch else NO_PARENT
        event = Connect(stamp=STAMP, walk=self.walk, block=block(at, parent, *ops))
        self.branch.append(at)
        self.contents.append(content)
        self.highest = max(self.highest, at.height)
        return Step(event=event, contents=[content])

    def _op(self, content: dict[bytes, bytes]) -> tuple[Op, bytes] | tuple[Op, bytes, bytes]:
        random = self.random
        key = coin(random.randrange(12), random.randrange(3), random.randrange(3))
        if key in content and random.random() < 0.7:
            del content[key]
            return Op.DELETE, key
        op = Op.PUT if key in content else random.choice((Op.CREATE, Op.PUT))
        content[key] = random.randbytes(random.choice((0, 1, 20, 60)))
        return op, key, content[key]


def make_walk(seed: int, count: int, **options: int) -> list[Step]:
    chain = Chain(random=Random(seed), **options)  # type: ignore[arg-type]
    return [chain.step() for _ in range(count)]


def content(store: Store) -> Content:
    """All (whole key, value) of a store."""
    return {
        key: value
        for storage_key, stored in store.scan()
        for key, value in schema_of_storage_key(storage_key).items(storage_key, stored)
    }


class Wire:
    """A list as the log of one partition. Its first record is the opening."""

    def __init__(self, opening: Opening = OPENING) -> None:
        self.opening = opening
        self.records = [encode_opening(opening)]
        self._sound = self.records[:]

    def meta(self) -> Meta:
        """Of a store that has read nothing but the opening."""
        return self.opening.meta(offset=0, digest=frame.digest_of(self.records[0]))

    def append(self, records: list[bytes], *, litter: Random | None = None) -> None:
        for record in records:
            self.records.append(record)
            self._sound.append(record)
            if litter is not None and litter.random() < 0.3:
                self.litter(litter, litter.randrange(1, 3))

    def litter(self, random: Random, count: int) -> None:
        """Append records that are void to every reader at this place, also between two chunks."""
        for _ in range(count):
            model = random.choice(self._sound)
            strange = frame.Header(
                kind=frame.Kind.EPOCH,
                codec=Codec.NONE,
                generation=random.choice((b"o" * 16, self.opening.generation.generation)),
                epoch=random.choice((0, 1_000_000)),
                writer=random.randbytes(16),
                chain_id="walk",
                table_roots={},
            )
            at = random.randrange(len(model))
            self.records.append(
                random.choice(
                    (
                        b"",
                        random.randbytes(random.randrange(1, 600)),
                        model[:at],
                        model[:at] + bytes([model[at] ^ 1 << random.randrange(8)]) + model[at + 1 :],
                        frame.encode(strange, b""),
                        numbered(replace(strange, kind=frame.Kind.APPLY, epoch=1, seq=1)),
                    )
                )
            )


def numbered(header: frame.Header) -> bytes:
    """A numbered frame that says nothing."""
    return frame.encode(replace(header, table_roots={1: bytes(32)}), b"\0")


class Node:
    """A replica on a wire. `reopen` forgets everything but the store, as a restart does."""

    def __init__(self, wire: Wire, store: Store | None = None, *, archives: bool = False) -> None:
        self.wire = wire
        self.store: Store = MemoryStore() if store is None else store
        self.archives = archives
        self.next = 0
        self.replica: Replica
        self.reopen()

    def reopen(self) -> None:
        held = self.store.get_meta(META_KEY)
        meta = self.wire.meta() if held is None else decode_meta(held)
        self.replica = Replica(self.store, meta, archives=self.archives)
        self.next = meta.diffs.next_offset

    @property
    def meta(self) -> Meta:
        return self.replica.meta

    def follow(self, count: int | None = None) -> list[Outcome]:
        """Step over the next records, all without ``count``."""
        stop = len(self.wire.records) if count is None else min(self.next + count, len(self.wire.records))
        outcomes = []
        while self.next < stop:
            outcomes.append(self.take(self.wire.records[self.next], self.next))
            self.next += 1
        return outcomes

    def take(self, record: bytes, offset: int) -> Outcome:
        return self.replica.step(record, offset)

    def follow_and_commit(self) -> None:
        self.follow()
        self.replica.commit()

    def segment(self, first: int, last: int) -> bytes:
        """Of committed final heights, both inclusive. Raises StoreCorrupt if the journal lacks one."""
        return build_segment(*Committed(self.store).contents(first, last))


class Writer(Node):
    """A node that is in force from its `start` on, and reads the events of `events` by their offset."""

    primary: Primary | None = None

    def start(self, writer: bytes = b"w" * 16, *, record_bytes_max: int = RECORD_BYTES_MAX) -> None:
        """Follow to the end, append the own EPOCH, follow to it."""
        self.primary = None
        self.follow()
        self.wire.append([epoch_frame(self.meta, writer)])
        assert isinstance(self.follow()[-1], Reign)
        self.replica.commit()
        self.primary = Primary(self.replica, record_bytes_max=record_bytes_max)

    def take(self, record: bytes, offset: int) -> Outcome:
        if self.primary is None:
            return super().take(record, offset)
        return self.primary.follow(record, offset)

    def propose(self, event: Event, offset: int, *, litter: Random | None = None) -> list[frame.Header]:
        """Propose an event that stood at ``offset`` of the blocks topic, and append its frames to the wire: with
        ``litter``, void records in between and some frames twice."""
        assert self.primary is not None
        digest = frame.digest_of(encode_event(event))
        reading = Reading(first=offset, last=offset, digest=digest, previous_digest=b"p" * 32)
        proposals = self.primary.propose(event, reading)
        for proposal in proposals:
            for _ in range(2 if litter is not None and litter.random() < 0.1 else 1):
                self.wire.append(proposal.records, litter=litter)
        return [proposal.step.header for proposal in proposals]


@dataclass(slots=True, kw_only=True)
class Driven:
    """A primary's run over a walk. ``expected``: the content after each frame, by its id."""

    writer: Writer
    expected: dict[bytes, Content]

    @property
    def wire(self) -> Wire:
        return self.writer.wire

    def check(self, node: Node) -> None:
        """The one invariant: what a node holds is what the model says at its position."""
        assert content(node.store) == self.expected[node.meta.frame_id]


def drive(steps: list[Step], *, seed: int, store: Store | None = None, litter: bool = True) -> Driven:
    """A primary over a whole walk, with read-backs and group commits at random places and void records between."""
    random = Random(seed)
    writer = Writer(Wire(), store)
    writer.start()
    driven = Driven(writer=writer, expected={frame.NO_HASH: {}})
    writer.propose(SourceEpoch(stamp=STAMP, resume_walk=1), 0)
    for offset, step in enumerate(steps, 1):
        headers = writer.propose(step.event, offset, litter=random if litter else None)
        assert len(headers) == len(step.contents), (len(headers), len(step.contents))
        driven.expected.update((header.frame_id, held) for header, held in zip(headers, step.contents, strict=True))
        if random.random() < 0.4:
            writer.follow(random.randrange(1, 12))
            if random.random() < 0.6:
                writer.replica.commit()
    writer.follow_and_commit()
    assert writer.primary is not None
    assert writer.primary.in_flight == writer.primary.proposed_bytes == writer.replica.layers.dirty_bytes == 0
    return driven
