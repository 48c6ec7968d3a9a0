"""The acts of the demo, in order. Each is what a user could type; what it gives goes into `Facts`."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import NotEmpty, NotFound
from topology import topics
from topology.data_dir import DataDir
from topology.demo.facts import NODES, Facts, Node, Reorg
from topology.demo.processes import Processes, Worker
from topology.demo.screen import Screen
from topology.demo.wire import WireReader, json_bytes_per_change
from topology.transports.factory import open_broker

MAINNET = Path(__file__).parents[2] / "tests/data/bitcoin/mainnet_0_599"
"""Where the real blocks are in a checkout."""
REORG_DEPTH = 6
BLOCKS_MIN = 2 * (REORG_DEPTH + 11)
"""Of the synthetic chain: its reorg happens halfway, and not before there is something to leave."""

FINALITY = 40
"""Less than the default of 100, so that a short chain has many final blocks, and few that only frames can bring."""

_MARK = "DEMO"
_POLL_S = 0.05
_SNAPSHOT_AT = 0.75
"""Of the synthetic chain: behind the reorg, and while both nodes still have much to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, and where."""

    folder: Path  # absolute
    mainnet: Path
    blocks: int  # of the synthetic chain
    changes: int  # of each of its blocks
    kafka_url: str = ""  # empty: an embedded log in the folder
    topic_prefix: str = ""

    @property
    def broker(self) -> str:
        return self.kafka_url or f"embedded://{self.folder}/log.sqlite"

    @property
    def places(self) -> dict[str, str]:
        """Settings of all nodes."""
        return {"broker": self.broker, "topic_prefix": self.topic_prefix, "objects": self.objects}

    @property
    def objects(self) -> str:
        return f"file://{self.folder}/objects"

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(word for name, value in self.places.items() for word in (f"--{name.replace('_', '-')}", value))

    @property
    def config(self) -> Path:
        return self.folder / "stateferry.toml"

    def data_dir(self, node: str) -> Path:
        return self.folder / node


def prepare(plan: Plan) -> None:
    """Empty the demo's folder, and write the settings that commands in it need. Raises NotEmpty for a folder of
    somebody else's, Locked while another demo runs in it, NotFound without the blocks."""
    if not (plan.mainnet / "expected_final.json").exists():
        raise NotFound(
            "the folder with mainnet blocks 0 to 599 is not there",
            where=str(plan.mainnet),
            way_out="name tests/data/bitcoin/mainnet_0_599 of a checkout with --mainnet",
        )
    if plan.folder.exists() and any(plan.folder.iterdir()) and not (plan.folder / _MARK).exists():
        raise NotEmpty(
            "the demo empties its folder first, and this one was not made by it",
            where=str(plan.folder),
            way_out="name another one with --data-dir",
        )


def empty(plan: Plan, owned: DataDir) -> None:
    """Nothing but the lock stays."""
    for path in owned.path.iterdir():
        if path.name == "LOCK":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (plan.folder / _MARK).write_text("made by stateferry demo, which empties this folder at every start\n")
    plan.config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in plan.places.items()))


async def run(plan: Plan, screen: Screen) -> Facts:
    """All acts. Raises what commands and workers raise; no process of ours is left either way."""
    prepare(plan)
    with DataDir(plan.folder) as owned:
        empty(plan, owned)
        demo = _Demo(plan, screen)
        try:
            return await demo.run()
        finally:
            await demo.close()


class _Demo:
    def __init__(self, plan: Plan, screen: Screen) -> None:
        self.plan = plan
        self.screen = screen
        self.processes = Processes(plan.folder)
        self.workers: dict[str, Worker] = {}
        self.broker = open_broker(plan.broker, plan.topic_prefix)
        self.tasks: list[asyncio.Task[Any]] = []
        expected = json.loads((plan.mainnet / "expected_final.json").read_text())
        self.facts = Facts(
            mainnet_height=expected["height"],
            mainnet_hash_expected=expected["tip"],
            muhash_expected=expected["muhash"],
        )
        self.wire: WireReader
        self.told_reorgs = 0

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.processes.close()
        await self.broker.close()

    async def run(self) -> Facts:
        started_s = time.monotonic()
        await self.mainnet()
        await self.synthetic()
        await self.restored()
        await self.replayed()
        await self.compare()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))
        for name, worker in self.workers.items():
            if name in self.facts.nodes and worker.peak_memory_mb:
                self.facts.nodes[name].peak_memory_mb = worker.peak_memory_mb
        self.facts.total_s = time.monotonic() - started_s
        return self.facts

    # Acts

    async def mainnet(self) -> None:
        """Two workers, and real blocks through them, up to a height whose coins are known."""
        facts = self.facts
        self.screen.say("1  a primary and a replica start, in processes of their own")
        starts = (self.start("primary", "primary", "--finality", str(FINALITY)), self.start("replica", "replica"))
        files = sorted(map(str, self.plan.mainnet.glob("blk*.dat")))
        publish = self.command("ingest", "bitcoin", *files, "--data-dir", str(self.plan.data_dir("source")))
        *_, published = await asyncio.gather(*starts, publish)
        generation = await topics.current_generation(self.broker)
        assert generation is not None, "blocks were published without a generation"
        self.wire = WireReader(self.broker, generation)
        self.screen.say(f"2  mainnet blocks 0 to {facts.mainnet_height}, from the file in the project")
        await self.follow(
            "mainnet  ", NODES[:2], published["walk"], lambda status: status["height"] >= facts.mainnet_height
        )
        facts.wire_mainnet = self.wire.since(0)
        for name, root in zip(NODES[:2], await asyncio.gather(*map(self.root, NODES[:2])), strict=True):
            facts.mainnet_hash_found[name] = root["block_hash"]
            facts.muhash_found[name] = root["muhash"]
            same = "as expected" if root["muhash"] == facts.muhash_expected else "NOT AS EXPECTED"
            self.screen.say(f"   {name}: {root['coins']} coins, MuHash {root['muhash'][:16]}..., {same}")

    async def synthetic(self) -> None:
        """Heavier blocks on top, a reorg halfway, a snapshot while both nodes go on."""
        facts, plan = self.facts, self.plan
        at_seq, started_s = self.wire.seq, time.monotonic()
        ingest = self.spawn(
            self.command(
                *("ingest", "synthetic", "--data-dir", str(plan.data_dir("source"))),
                *("--blocks", str(plan.blocks), "--changes", str(plan.changes)),
                *("--from-height", str(facts.mainnet_height)),
                *("--reorg-every", str((plan.blocks + 1) // 2), "--reorg-depth", str(REORG_DEPTH)),
            )
        )
        self.screen.say(
            f"3  {plan.blocks} synthetic blocks of {plan.changes:,} changes on top, a reorg halfway; final {FINALITY} "
            "below the tip"
        )
        snapshot: asyncio.Task[None] | None = None
        snapshot_height = facts.mainnet_height + int(_SNAPSHOT_AT * plan.blocks)

        def reached(status: dict[str, Any]) -> bool:
            nonlocal snapshot
            if snapshot is None and status["role"] == "primary" and status["height"] >= snapshot_height:
                snapshot = self.spawn(self.snapshot(status["height"]))
            if not ingest.done():
                return False
            tip = ingest.result()
            return (status["height"], status["block_hash"]) == (tip["height"], tip["block_hash"])

        await self.follow("synthetic", NODES[:2], plan.blocks + REORG_DEPTH + 1, reached)
        seconds = time.monotonic() - started_s
        tip = await ingest
        facts.tip_height, facts.tip_hash = tip["height"], tip["block_hash"]
        facts.wire_synthetic = self.wire.since(at_seq)
        facts.changes_per_s = facts.wire_synthetic.changes / seconds
        self.screen.say(
            f"   both at height {facts.tip_height} after {seconds:.1f} s: {facts.changes_per_s:,.0f} changes/s from "
            "source to replica"
        )
        assert snapshot is not None, "the tip is above the snapshot's trigger"
        await snapshot
        facts.json_zstd_bytes_per_change = await asyncio.to_thread(
            json_bytes_per_change, plan.folder / "objects", facts.mainnet_height + 1
        )

    async def snapshot(self, height: int) -> None:
        taken = await self.command("snapshot", "--data-dir", str(self.plan.data_dir("primary")))
        status = await self.workers["primary"].status()
        after = height if status is None else status["height"]
        facts = self.facts
        facts.snapshot_height, facts.snapshot_root = taken["height"], taken["root"]
        facts.snapshot_at_heights = (height, after)
        self.screen.say(
            f"   snapshot of final height {taken['height']}: {taken['keys']:,} coins, {taken['bytes'] / 1e6:.1f} MB, "
            f"in {taken['seconds']:.1f} s; the primary went from height {height} to {after} meanwhile"
        )

    async def restored(self) -> None:
        """A second replica from the object store alone, then frames to the tip."""
        facts, data_dir = self.facts, self.plan.data_dir("restored")
        self.screen.say("4  a second replica, restored from the object store, then brought to the tip by frames")
        started_s = time.monotonic()
        document = await self.command("restore", "--data-dir", str(data_dir))
        facts.restore_s, facts.restore_height = time.monotonic() - started_s, document["height"]
        self.screen.say(
            f"   height {document['height']} {document['proof']}, {document['keys']:,} keys, in {facts.restore_s:.1f} s"
        )
        facts.restore_to_tip_s = await self.to_the_tip("restored", document["offsets"]["blocks"])
        if document["height"] >= facts.mainnet_height:
            data_dir = self.plan.data_dir(f"at-{facts.mainnet_height}")
            height = str(facts.mainnet_height)
            await self.command("restore", "--height", height, "--data-dir", str(data_dir))
            root = await self.command("root", "--interop", "muhash", "--data-dir", str(data_dir))
            facts.mainnet_hash_found["restored"], facts.muhash_found["restored"] = root["block_hash"], root["muhash"]
            self.screen.say(f"   and height {height} restored from the archive: MuHash {root['muhash'][:16]}...")

    async def replayed(self) -> None:
        """What a restore saves: a third replica that reads every frame from the first one on."""
        self.screen.say("5  for comparison, a third replica that replays all frames from the start")
        self.facts.replay_s = await self.to_the_tip("replayed", 0)
        await self.workers["replayed"].stop()
        del self.workers["replayed"]

    async def compare(self) -> None:
        facts = self.facts
        for name, root in zip(NODES, await asyncio.gather(*map(self.root, NODES)), strict=True):
            facts.nodes[name] = Node(**{field: root[field] for field in Node.__annotations__ if field in root})
        facts.reorgs = [
            Reorg(from_height=reorg.from_height, to_height=reorg.fork_height, depth=reorg.depth)
            for reorg in self.wire.reorgs
        ]

    # Means

    async def start(self, name: str, role: str, *arguments: str) -> None:
        given = (*self.plan.options, *arguments)
        self.workers[name] = await self.processes.start(name, self.plan.data_dir(name), "--role", role, *given)

    async def command(self, *arguments: str) -> dict[str, Any]:
        given = self.plan.options
        return await self.processes.command(*arguments, *given)

    async def root(self, name: str) -> dict[str, Any]:
        return await self.command("root", "--interop", "muhash", "--data-dir", str(self.plan.data_dir(name)))

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task

    async def to_the_tip(self, name: str, from_offset: int) -> float:
        """Seconds from starting a replica until it stands at the tip."""
        facts = self.facts
        started_s = time.monotonic()
        await self.start(name, "replica")
        blocks = await self.wire.waiting_blocks(from_offset)
        tip = (facts.tip_height, facts.tip_hash)
        await self.follow(f"{name:<9}", [name], blocks, lambda status: (status["height"], status["block_hash"]) == tip)
        seconds = time.monotonic() - started_s
        self.screen.say(f"   at height {facts.tip_height} in {seconds:.1f} s")
        return seconds

    async def follow(
        self, title: str, names: Sequence[str], total_blocks: int, reached: Callable[[dict[str, Any]], bool]
    ) -> None:
        """Watch some workers until all of them got there."""
        workers = [self.workers[name] for name in names]
        started_at: int | None = None
        with self.screen.bar(title, total_blocks) as bar:
            while True:
                for task in self.tasks:
                    if task.done():
                        task.result()
                statuses = await asyncio.gather(*(worker.status() for worker in workers))
                await self.wire.advance()
                known = [status for status in statuses if status is not None]
                if len(known) == len(workers):
                    next_offset = min(status["offsets"]["blocks"] for status in known)
                    started_at = next_offset if started_at is None else started_at
                    bar.update(
                        height=min(status["height"] for status in known),
                        changes=self.wire.changes_to(min(status["seq"] for status in known)),
                        done_blocks=next_offset - started_at,
                        lag_blocks=await self.wire.waiting_blocks(next_offset),
                    )
                    self._tell_reorgs(min(status["seq"] for status in known))
                    arrived = [reached(status) for status in known]
                    if all(arrived):
                        return
                await asyncio.sleep(_POLL_S)

    def _tell_reorgs(self, seq: int) -> None:
        """Say what was taken back, once every node that is watched has taken it back."""
        for reorg in self.wire.reorgs[self.told_reorgs :]:
            if seq < reorg.last_seq:
                return
            self.told_reorgs += 1
            self.screen.say(
                f"   reorg of depth {reorg.depth}: blocks {reorg.from_height} down to {reorg.fork_height + 1} taken "
                f"back by both, another branch followed from height {reorg.fork_height}"
            )
