"""`bench apply`: what a primary does with a block, without any broker, against a bare write of the same changes.

A row `synthetic-5000` is the whole of it, per block: decode the event, read, net, LtHash, delta, compress, frame with
its id, undo record, write, pruning beyond finality, and an archive segment every 64 blocks. A frame is read back as
soon as it is finished, and every block is a commit of its own. As in a worker, a process beside it seals (hashes,
encodes, compresses) a block while the next one is read and netted; its time and memory are not in the columns for CPU
and memory. Also as there, a thread puts segments into the archive. The row `synthetic-5000-alone` does all in one
process and one thread, and shows where all the time goes.

The baseline `writebatch-synthetic-5000` writes the same changes, decoded and netted beforehand, in the block's order,
with one bare WriteBatch a block to a RocksDB of the same options. `writebatch-synthetic-5000-sorted` gets them sorted
beforehand as well: the most that RocksDB can take in on one thread.

They take turns, some blocks each. `cpu_us_per_change` is CPU time of the one thread that does it: on a machine with
other work to do it says more than the clock on the wall, from which everything else is taken.

The row `block-367891` applies one real block on its base coins again and again; between two times it is taken back,
untimed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from rocksdict import Rdict, WriteBatch

from pipeline import frame, primary, seal
from pipeline.block import Block, decode_event
from pipeline.diff import Diff
from pipeline.objects.local import LocalObjects
from pipeline.primary import Primary, Reading
from pipeline.replica import Replica
from pipeline.state import UTXO
from pipeline.stores.base import Batch
from pipeline.stores.memory import MemoryStore
from pipeline.stores.rocksdb import RocksStore, state_options
from topology.archiver import Archiver, Due
from topology.bench import loads
from topology.bench.report import Row, Stage, stages_of
from topology.bench.workers import Worker, peak_rss_mb
from topology.lead import BEGUN_MAX
from topology.sealing import Sealing

SIZES = (2_000, 5_000, 14_000)
"""Changes a block: a small block, an ordinary one of recent years, one of the fullest."""
BLOCKS = 200
"""The second half of them prunes and archives, as finality is 100."""
REPEATS = 40
"""Times that the real block is applied."""
_TURN_BLOCKS = 100
"""Enough that the blocks still begun at the end of a turn, for which it waits, do not count."""


class Taken(NamedTuple):
    """Time that something took, by the clock on the wall and of this thread's CPU."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def plus(self, more: Taken) -> Taken:
        return Taken(self.wall_s + more.wall_s, self.cpu_s + more.cpu_s)


class Clock:
    """Sums up what is done in its context."""

    def __init__(self) -> None:
        self.taken = Taken()
        self._start = Taken()

    def __enter__(self) -> None:
        self._start = Taken(time.perf_counter(), time.thread_time())

    def __exit__(self, *_: object) -> None:
        wall_s, cpu_s = self._start
        self.taken = self.taken.plus(Taken(time.perf_counter() - wall_s, time.thread_time() - cpu_s))


class Stopwatch:
    """Where the time goes: seconds by stage, each without the stages inside of it."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self._inner = [0.0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] += taken - self._inner.pop()
            self._inner[-1] += taken

    def watch(self, owner: object, attribute: str, name: str | Callable[..., str]) -> None:
        """Count every call of ``owner.attribute``, from now on and for good, as a stage: a bench process does nothing
        else. The real code runs, and a handful of calls a block cost nothing that could be seen."""
        call = getattr(owner, attribute)

        def watched(*arguments: Any, **named: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name(*arguments, **named)):
                return call(*arguments, **named)

        setattr(owner, attribute, watched)


DECODE, READ, NET, LTHASH = "decode the event", "read before-values", "run, net, sort", "LtHash"
WIRE, WHOLE = "wire: references, compress", "whole form: encode, compress, id"
SEAL = "wait for the seal"
WRITE, ARCHIVE = "write: state, undo, meta", "archive"
STAGES = (DECODE, READ, NET, LTHASH, WIRE, WHOLE, SEAL, WRITE, ARCHIVE)


def watch_pipeline(stopwatch: Stopwatch) -> None:
    stopwatch.watch(RocksStore, "get", READ)
    stopwatch.watch(primary, "apply_block", NET)
    stopwatch.watch(Diff, "gains", LTHASH)
    stopwatch.watch(Diff, "created", WIRE)
    stopwatch.watch(seal, "encode_references", WIRE)
    stopwatch.watch(Diff, "encode", WHOLE)
    stopwatch.watch(frame, "frame_id", WHOLE)
    stopwatch.watch(seal, "pack", lambda *_, is_own=False: WHOLE if is_own else WIRE)
    stopwatch.watch(Sealing, "receive", SEAL)
    stopwatch.watch(Replica, "accept", WRITE)
    stopwatch.watch(Replica, "commit", WRITE)


class Applier:
    """A primary on a store of its own. Asked with events, it answers with the time they took; with None, with the
    stages and its peak memory."""

    def __init__(self, path: Path, real: loads.RealBlock | None, *, alone: bool = False) -> None:
        self._store = RocksStore(path / "store")
        self._archiver = Archiver(LocalObjects(path / "objects"))
        self._replica = loads.open_replica(self._store, real, archives=real is None)
        self._goes_back = real is not None
        self._offset = self._replica.meta.diffs.next_offset
        self._input = 0
        self._previous = b""
        self._sealing = None if alone else Sealing()
        self._putting = None if alone else ThreadPoolExecutor(1)
        self._put: tuple[Due, Future[Any]] | None = None
        self._start()
        self._stopwatch = Stopwatch(STAGES)
        watch_pipeline(self._stopwatch)

    def _start(self) -> None:
        sealer = seal.seal_at_once if self._sealing is None else self._sealing.submit
        self._primary = Primary(self._replica, sealer=sealer)
        self._primary.propose(loads.source_epoch(), self._reading(b""))

    def _reading(self, record: bytes) -> Reading:
        digest = frame.digest_of(record)
        reading = Reading(first=self._input, last=self._input, digest=digest, previous_digest=self._previous)
        self._input, self._previous = self._input + 1, digest
        return reading

    def answer(self, events: list[bytes] | None) -> Any:
        if events is None:
            return self._stopwatch.seconds, peak_rss_mb()
        clock = Clock()
        for event in events:
            if self._goes_back:
                with clock:
                    self._finish()
                if self._replica.meta.tip.seq:
                    self._take_back()
            with clock:
                self._begin(event)
        with clock:
            self._finish()
            while self._put is not None:
                wait([self._put[1]])
                self._archive()
            self._replica.commit()
        return clock.taken

    def _begin(self, event: bytes) -> None:
        with self._stopwatch.stage(DECODE):
            decoded = decode_event(event)
        self._primary.begin(decoded, self._reading(event))
        self._finish(begun_max=BEGUN_MAX)

    def _finish(self, *, begun_max: int = 0) -> None:
        replica = self._replica
        while self._primary.begun > begun_max:
            for record in self._primary.finish().records:
                self._primary.follow(record, self._offset)
                self._offset += 1
            replica.commit()
            if not self._goes_back:
                with self._stopwatch.stage(ARCHIVE):
                    self._archive()

    def _archive(self) -> None:
        """As a worker does: the segment is made here, and put while blocks go on."""
        if self._putting is None:
            self._archiver.advance(self._replica, proven=True)
            return
        if self._put is not None:
            due, put = self._put
            if not put.done():
                return
            put.result()
            self._archiver.done(self._replica, due)
            self._put = None
        due_now = self._archiver.plan(self._replica, proven=True)
        if due_now is not None:
            self._put = due_now, self._putting.submit(self._archiver.put, due_now)

    def _take_back(self) -> None:
        kept = dict(self._stopwatch.seconds)
        self._replica.take_back()
        self._start()
        self._stopwatch.seconds |= kept

    def close(self) -> None:
        if self._sealing is not None:
            self._sealing.close()
        if self._putting is not None:
            self._putting.shutdown()
        self._store.close()


Change = tuple[bytes, bytes | None]


class BareWriter:
    """One WriteBatch a block, and nothing else. Asked with (changes, what takes them back or
    nothing) a block, it answers with the time of the changes."""

    def __init__(self, path: Path, base: list[Change]) -> None:
        self._db = Rdict(str(path), state_options())
        self._write(base)

    def answer(self, blocks: list[tuple[list[Change], list[Change]]] | None) -> Any:
        if blocks is None:
            return {}, peak_rss_mb()
        clock = Clock()
        for changes, back in blocks:
            with clock:
                self._write(changes)
            if back:
                self._write(back)
        return clock.taken

    def _write(self, changes: list[Change]) -> None:
        batch = WriteBatch(raw_mode=True)
        put, delete = batch.put, batch.delete
        for key, value in changes:
            if value is None:
                delete(key)
            else:
                put(key, value)
        self._db.write(batch)

    def close(self) -> None:
        self._db.close()


def run(*, blocks: int = BLOCKS, sizes: Sequence[int] = SIZES, repeats: int = REPEATS, data: Path) -> list[Row]:
    """All rows, each beside its baseline."""
    rows: list[Row] = []
    real = loads.real_block(367_891, data)
    if real is not None:
        rows += pair("block-367891", repeat(real.block, repeats), real)
    for size in sizes:
        rows += pair(f"synthetic-{size}", loads.synthetic_blocks(blocks, size))
    return rows


def pair(name: str, blocks: Iterator[Block], real: loads.RealBlock | None = None) -> list[Row]:
    """One load through both, in turns. ``real``: the blocks are this one, again and again."""
    model = MemoryStore()
    if real is not None:
        loads.open_replica(model, real)
    base = sorted(model.state.items())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stateferry-bench-")))
        bare = stack.enter_context(Worker(BareWriter, folder / "bare", base))
        ascending = stack.enter_context(Worker(BareWriter, folder / "sorted", base))
        alone = stack.enter_context(Worker(partial(Applier, alone=True), folder / "alone", real))
        whole = stack.enter_context(Worker(Applier, folder / "whole", real))
        taken = dict.fromkeys((bare, ascending, alone, whole), Taken())
        done = walk = 0
        while turn := list(islice(blocks, _TURN_BLOCKS)):
            questions: dict[Worker, list[Any]] = {worker: [] for worker in taken}
            for block in turn:
                walk = walk + 1 if real is None else 1
                diff, writes = loads.net(block, model)
                ascends = sorted(writes.items())
                back = [] if real is None else [(key, model.state.get(key)) for key, _ in ascends]
                if real is None:
                    model.write(Batch(state=writes))
                keys = UTXO.storage_keys(block.tables[UTXO.name].keys)
                in_order = [(key, writes[key]) for key in dict.fromkeys(keys) if key in writes]
                questions[bare].append((in_order, back))
                questions[ascending].append((ascends, back))
                event = loads.event_of(block, walk)
                questions[alone].append(event)
                questions[whole].append(event)
                done += len(diff)
            for worker, asked in questions.items():
                taken[worker] = taken[worker].plus(worker.ask(asked))
        _, bare_mb = bare.ask(None)
        _, ascending_mb = ascending.ask(None)
        alone_stages, alone_mb = alone.ask(None)
        stages, whole_mb = whole.ask(None)
    baseline = f"writebatch-{name}"

    def row(name: str, worker: Worker, rss_mb: float, stages: Sequence[Stage] = ()) -> Row:
        return Row(
            name=name,
            measures={
                "changes_per_s": done / taken[worker].wall_s,
                "cpu_us_per_change": 1e6 * taken[worker].cpu_s / done,
            },
            baseline="" if name == baseline else baseline,
            ratio=None if name == baseline else taken[bare].wall_s / taken[worker].wall_s,
            peak_rss_mb=rss_mb,
            stages=stages,
            changes=done,
        )

    return [
        row(baseline, bare, bare_mb),
        row(f"{baseline}-sorted", ascending, ascending_mb),
        row(name, whole, whole_mb, stages_of(stages, taken[whole].wall_s)),
        row(f"{name}-alone", alone, alone_mb, stages_of(alone_stages, taken[alone].wall_s)),
    ]
