"""A site is one directory with all that belongs together: a log, an object store, and nodes that follow the log.

Commands run as a user runs them. `Site.look` says what there is afterwards, without what may differ between two runs
of the same history: epochs, writers, offsets.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from walks import coin

from pipeline import frame, journal
from pipeline.anchors import AnchorBook, Joined, decode_anchor
from pipeline.archive import Segment
from pipeline.block import Block, BlockRef, Connect, Event, Op, Ops, Rewind
from pipeline.errors import EventCorrupt
from pipeline.frame import NO_HASH, Header
from pipeline.generation import Generation, decode_opening
from pipeline.inlet import EventReader, SourcePosition
from pipeline.objects.local import LocalObjects
from pipeline.position import NO_WRITER, START, Meta, Tip, decode_meta
from pipeline.range_pieces import Piece
from pipeline.replica import Replica
from pipeline.snapshot import decode_manifest
from pipeline.sources.synthetic import SyntheticChain
from pipeline.stores.base import META_KEY, PROOF_KEY
from pipeline.stores.memory import MemoryStore
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import decode_proof
from tests.kafka.fixtures import Place
from tests.processes import Command
from topology import source, topics
from topology.squasher import archives, squash
from topology.transports.base import Broker
from topology.transports.factory import open_broker
from topology.transports.sqlite_file import OFFSET_BITS

from .points import Kill

ROOT = Path(__file__).parents[2]
GENERATION = Generation(generation=b"torture's blocks", chain_id="torture")
"""Always the same one, so that frame ids of two runs can be compared."""
SHARDED = replace(GENERATION, shards=2)
FINALITY = 8
BLOCKS = 190
REORG_EVERY = 17
GROUP_BYTES_MAX = 1 << 16
"""Some eight frames a write: many writes, whatever the machine's speed."""
TIMEOUT_S = 240.0
"""For one command, which takes a second on an idle machine. A process that does not pass its fail point ends here."""


def make_blocks(count: int = BLOCKS, seed: int = 7) -> list[Block]:
    """A chain in the order of its walk: a fork now and then, two dozen keys that share short keys in buckets."""
    chain = SyntheticChain(seed=seed, changes=40)
    random = Random(seed)
    contents: list[set[bytes]] = [set()]
    made: list[Block] = []
    for number in range(1, count + 1):
        (block,) = chain.extend(1)
        held = set(contents[-1])
        contents.append(held)
        made.append(replace(block, tables={"utxo": _with_buckets(block.tables["utxo"], held, random)}))
        if number % REORG_EVERY == 0 and REORG_EVERY < number < count - REORG_EVERY // 2:
            depth = random.randint(1, 5)
            chain.fork(depth, number)
            del contents[-depth:]
    return made


def _with_buckets(ops: Ops, held: set[bytes], random: Random) -> Ops:
    codes, keys, values = bytearray(ops.codes), list(ops.keys), list(ops.values)
    for _ in range(random.randrange(8)):
        key = coin(random.randrange(4), random.randrange(2), random.randrange(3))
        keys.append(key)
        if key in held:
            held.remove(key)
            codes.append(Op.DELETE)
        else:
            held.add(key)
            codes.append(Op.CREATE)
            values.append(random.randbytes(random.choice((0, 1, 20, 60))))
    return Ops(codes=bytes(codes), keys=keys, values=values)


HEIGHT = max(block.ref.height for block in make_blocks())
assert make_blocks()[-1].ref.height == HEIGHT


@dataclass
class Site:
    """``kills`` by step: where the processes of that step end first. Steps count the calls of `step` and `run`.

    ``place``: where the log is; None: embedded, in the site's folder.
    """

    path: Path
    place: Place | None = None
    kills: dict[int, list[Kill]] = field(default_factory=dict)
    torn: int = 0
    step_number: int = 0
    outputs: int = 0

    @property
    def log(self) -> Path:
        return self.path / "log.sqlite"

    @property
    def url(self) -> str:
        return f"embedded://{self.log}" if self.place is None else self.place.url

    @property
    def prefix(self) -> str:
        return "" if self.place is None else self.place.prefix

    # Commands

    def start(self, *words: str, node: str, kill: Kill | None = None) -> Command:
        """A command on a node's directory, as a user starts it."""
        environment = self.environment(node)
        if kill is not None:
            environment["STATEFERRY_FAILPOINT"] = f"{kill.failpoint}:{kill.hit}"
        self.outputs += 1
        output = self.path / f"{node}.{self.outputs}.out"
        return Command(*words, environment=environment, folder=self.path, output=output)

    def environment(self, node: str) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STATEFERRY_")}
        return environment | {
            "PYTHONPATH": str(ROOT),
            "STATEFERRY_GROUP_BYTES_MAX": str(GROUP_BYTES_MAX),
            "STATEFERRY_BROKER": self.url,
            "STATEFERRY_TOPIC_PREFIX": self.prefix,
            "STATEFERRY_OBJECTS": f"file://{self.path / 'objects'}",
            "STATEFERRY_DATA_DIR": str(self.path / node),
        }

    def finish(self, command: Command, kill: Kill | None) -> None:
        """Wait for a command: it must have passed its fail point, or have ended well."""
        try:
            code = command.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            command.send_signal(signal.SIGKILL)
            raise AssertionError(f"{command.args} with {kill} did not end: {command.told()}") from None
        told = f"{command.args} with {kill} ended with {code}: {command.told()}"
        if kill is None:
            assert code == 0, told
        elif kill.helper:
            assert code == 1 and "ended early, with code -9" in command.told(), told
        else:
            assert code == -signal.SIGKILL, told

    def step(self, *words: str, node: str, until: tuple[str, ...] = ()) -> None:
        """One command to its end: killed where this step has kills, and each time started again.

        ``until`` is for the last time only: it must not end before it was killed.
        """
        kills = self.kills.get(self.step_number, [])
        self.step_number += 1
        for kill in kills:
            self.finish(self.start(*words, node=node, kill=kill), kill)
            self.tear(node)
        self.finish(self.start(*words, *until, node=node), None)

    def run(self, node: str, role: str, *until: str) -> None:
        until = until or ("--until-height", str(HEIGHT))
        self.step("run", "--role", role, *self._finality(role), node=node, until=until)

    def _finality(self, role: str) -> tuple[str, ...]:
        return ("--finality", str(FINALITY)) if role == "primary" else ()

    def run_both(self) -> None:
        """A primary and a replica at the same time; who is killed is started again while the other one goes on."""
        ways = (("p", "primary"), ("r", "replica"))
        until = ("--until-height", str(HEIGHT))
        running = []
        for node, role in ways:
            words = ("run", "--role", role, *self._finality(role))
            kill = next(iter(self.kills.get(self.step_number, [])), None)
            self.step_number += 1
            process = self.start(*words, *(() if kill else until), node=node, kill=kill)
            running.append((node, words, process, kill))
        again = []
        for node, words, process, kill in running:
            self.finish(process, kill)
            if kill is not None:
                again.append(self.start(*words, *until, node=node))
        for process in again:
            self.finish(process, None)

    # Damage

    def tear(self, node: str) -> None:
        """What a power cut does to a store: the end of its write-ahead log is gone."""
        for store in store_paths(self.path / node):
            logs = sorted(store.glob("*.log"))
            if self.torn and logs:
                size = logs[-1].stat().st_size
                os.truncate(logs[-1], size - size * self.torn // 1000)

    def cut(self, topic: str, count: int) -> None:
        """What a power cut does to a broker that acknowledges too early: the end of a topic is gone."""
        connection = sqlite3.connect(self.log)
        with connection:
            (partition, end), *_ = connection.execute(
                "SELECT partition.id, end FROM partition JOIN topic ON topic.id = topic_id WHERE name = ?", (topic,)
            ).fetchall()
            assert end > count, (end, count)
            connection.execute("UPDATE partition SET end = ? WHERE id = ?", (end - count, partition))
            base = partition << OFFSET_BITS
            gone = connection.execute("DELETE FROM record WHERE id >= ? AND id < ?", (base + end - count, base + end))
            assert gone.rowcount == count, (gone.rowcount, count)
        connection.close()

    # The log, in this process

    def publish(self, blocks: list[Block], generation: Generation = GENERATION) -> None:
        """``generation``: opened if there is none."""

        async def append(broker: Broker) -> None:
            in_force = await topics.current_generation(broker) or await topics.open_generation(broker, generation)
            publisher = source.Publisher(broker, in_force, await source.read_position(broker, in_force))
            for offer in source.offers(blocks):
                await publisher.offer(offer)
            await publisher.flush()

        self.with_broker(append)

    def with_broker(self, use: Callable[[Broker], Any]) -> Any:
        async def main() -> Any:
            broker = open_broker(self.url, self.prefix)
            try:
                return await use(broker)
            finally:
                await broker.close()

        return asyncio.run(main())

    # Looking

    def look(self) -> dict[str, Any]:
        """Everything here, by name."""
        found: dict[str, Any] = {}
        for folder in sorted(self.path.iterdir()):
            for store in store_paths(folder):
                name = str(store.parent.relative_to(self.path))
                found |= {f"{name} {what}": held for what, held in _look_at_store(store).items()}
            assert not (folder / "quarantine").exists(), folder
        found |= self.with_broker(_look_at_log)
        _squash_the_rest(self.path / "objects")
        found |= _look_at_objects(self.path / "objects")
        return found


def store_paths(node: Path) -> list[Path]:
    """The stores of a node: one, or one a shard."""
    return [path for path in (node / "store", *sorted((node / "shards").glob("*/store"))) if path.is_dir()]


def timeless(meta: Meta) -> Meta:
    return replace(
        meta,
        epoch=0,
        writer=NO_WRITER,
        source_epoch=0,
        source_writer=NO_WRITER,
        blocks=START,
        diffs=START,
    )


def _timeless_header(header: Header) -> Header:
    return replace(
        header,
        epoch=0,
        writer=NO_WRITER,
        source_epoch=0,
        source_writer=NO_WRITER,
        next_input_offset=0,
        input_digest=NO_HASH,
    )


def timeless_journal(items: Iterable[tuple[bytes, bytes]]) -> dict[bytes, Any]:
    """The entries of the family `undo`, decoded."""
    entries: dict[bytes, Any] = {}
    for key, value in items:
        if key.startswith(b"j"):
            entry = journal.decode_entry(value)
            decoded = frame.decode(entry.frame_bytes)
            entries[key] = (timeless(entry.before), _timeless_header(decoded.header), decoded.body)
        else:
            entries[key] = value
    return entries


def _look_at_store(path: Path) -> dict[str, Any]:
    store = RocksStore(path, read_only=True)
    try:
        data = store.get_meta(META_KEY)
        assert data is not None, path
        return {
            "state": dict(store.scan()),
            "position": timeless(decode_meta(data)),
            "journal": timeless_journal(store._undo.items()),
            "is proven": decode_proof(store.get_meta(PROOF_KEY)).proven,
        }
    finally:
        store.close()


async def _look_at_log(broker: Broker) -> dict[str, Any]:
    """The walk, and of each shard the frames in force, as a reader finds them; where shards say that they stand."""
    generation = await topics.current_generation(broker)
    assert generation is not None
    found: dict[str, Any] = {"log events": await _events(broker, generation)}
    tips: dict[tuple[int, int], Tip] = {}
    for shard in range(generation.shards if generation.base is None else 0):
        records = [record async for record in topics.records(broker, generation.diffs_topic, partition=shard)]
        if not records:
            continue
        opening = decode_opening(records[0].value)
        replica = Replica(MemoryStore(), opening.meta(offset=0, digest=frame.digest_of(records[0].value)))
        frames = []
        for record in records[1:]:
            replica.step(record.value, record.offset)
            if replica.meta.seq > len(frames):
                frames.append((replica.meta.seq, replica.meta.frame_id))
                tips[shard, replica.meta.seq] = replica.meta.tip
        name = "log" if generation.shards == 1 else f"log shard {shard}"
        found |= {f"{name} frames": frames, f"{name} position": timeless(replica.meta)}
    if generation.shards > 1:
        found["log anchors"] = await _anchored(broker, generation, tips)
    return found


async def _anchored(broker: Broker, generation: Generation, tips: dict[tuple[int, int], Tip]) -> Joined | None:
    """What the anchors say of all shards together. Every one must say what its shard's frames lead to."""
    book = AnchorBook(generation.generation, generation.shards)
    async for record in topics.records(broker, generation.anchors_topic):
        anchor = decode_anchor(record.value)
        if anchor.tip.seq > 0:
            led = tips[anchor.shard, anchor.tip.seq]
            assert (anchor.tip.ref, anchor.tip.root, anchor.tip.counts) == (led.ref, led.root, led.counts), anchor
        book.feed(record.value)
    return book.newest()


async def _events(broker: Broker, generation: Generation) -> list[tuple[int, BlockRef, object]]:
    position = SourcePosition(generation)
    reader = EventReader(generation.generation)
    events = []
    async for record in topics.records(broker, generation.blocks_topic):
        try:
            found = reader.feed(record.value, record.offset, position.source)
        except EventCorrupt:
            position.meet_bad_record()
            continue
        if found is None:
            continue
        before = position.walk
        position.follow(found[0])
        if position.walk > before:
            events.append(_event(found[0]))
    return events


def _event(event: Event) -> tuple[int, BlockRef, object]:
    match event:
        case Connect(walk=walk, block=block):
            return walk, block.ref, block
        case Rewind(walk=walk, to=to):
            return walk, to, None
        case _:
            raise AssertionError(event)


def _squash_the_rest(folder: Path) -> None:
    """A primary makes range diffs when it finds the time, or is ended before. What it made must fit what others make of
    the same archive: they would be told of a conflict."""
    objects = LocalObjects(folder)
    for archive in archives(objects):
        with tempfile.TemporaryDirectory() as scratch:
            for _ in squash(objects, archive, Path(scratch) / "work"):
                pass


def _look_at_objects(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = f"object {path.relative_to(folder)}"
        if path.suffix == ".seg":
            segment = Segment.open(path.read_bytes())
            found[name] = ([entry[:3] for entry in segment.entries], timeless(segment.resume))
        elif path.suffix == ".rng":
            piece = Piece.of_bytes(path.read_bytes())
            found[name] = (piece.head, timeless(piece.resume), [entry.changes for entry in piece.entries])
        elif path.name == "manifest.json":
            manifest = decode_manifest(path.read_bytes())
            parts = [(part.keys, part.partials) for part in manifest.parts]
            found[name] = (list(map(timeless, manifest.resumes)), parts)
        elif path.parent.name == "leases" or path.name.startswith(".new-"):
            pass  # of one that was killed: a lease expires, a put that ended half-way is no object
        elif path.is_file() and path.suffix != ".sst":
            found[name] = path.stat().st_size
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not as expected, a line each."""
    lines = []
    for name in sorted(found.keys() | expected.keys()):
        one, other = found.get(name), expected.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            keys = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
            detail = f"{len(keys)} of {len(other)} keys, as {sorted(keys)[:4]}"
        elif isinstance(one, list) and isinstance(other, list):
            at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), "the end")
            detail = f"{len(one)} instead of {len(other)} items, from {at}"
        else:
            detail = f"{one!r:.600} instead of {other!r:.600}"
        lines.append(f"{name}: {detail}")
    return lines


# Templates


class Templates:
    """Sites that many points begin with, and what each scene leads to undisturbed: made once, by whoever is first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def copy(self, name: str, path: Path, make: dict[str, tuple[str, Callable[[Site], None]]]) -> None:
        """A fresh copy of a template; ``make``: the one it grows from (empty: none), and how."""
        shutil.copytree(self._made(name, make), path)

    def _made(self, name: str, make: dict[str, tuple[str, Callable[[Site], None]]]) -> Path:
        done = self.folder / name
        with self._locked(name):
            if not done.exists():
                base, grow = make[name]
                draft = self.folder / f"{name}.draft"
                shutil.rmtree(draft, ignore_errors=True)
                if base:
                    shutil.copytree(self._made(base, make), draft)
                else:
                    draft.mkdir()
                grow(Site(draft))
                draft.rename(done)
        return done

    def outcome(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is remembered under a name; computed the first time."""
        file = self.folder / f"{name}.outcome"
        with self._locked(f"{name}-outcome"):
            if not file.exists():
                draft = file.with_suffix(".draft")
                draft.write_bytes(pickle.dumps(compute()))
                draft.rename(file)
        found: dict[str, Any] = pickle.loads(file.read_bytes())
        return found
