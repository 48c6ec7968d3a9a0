"""The shards of one worker: a node for each that the generation has, whether this worker owns it or not.

A replica owns all of them and keeps them together: it writes a frame once every shard has it, so that its stores stand
at one position. A primary owns what its group gives it, and each of its shards goes its own way. A shard that comes to
a worker anew is restored beside (`restoring`) if the newest snapshot is far ahead of it, and followed from where its
store stands, until it has caught up: then it is claimed. The other shards go on meanwhile.

With one shard all of this is one node, owned for ever.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence

from pipeline.errors import NotFound, StateferryError
from pipeline.generation import Generation, Opening
from pipeline.group import Step
from pipeline.position import Meta
from pipeline.shards import join_metas, stand_together
from pipeline.verify import Proof
from topology import floors, logs, prefetching
from topology.abreast import Abreast
from topology.anchors import Anchoring
from topology.archiving import Archiving
from topology.building import held_meta
from topology.data_dir import DataDir
from topology.ending import Ending
from topology.lead import Produce, State
from topology.node import Node
from topology.prefetching import Prefetching
from topology.restoring import Restoring, lacks, newest_resumes
from topology.sealing import Sealing
from topology.settings import Settings
from topology.shard_store import Role
from topology.splitter import ProduceTo, Splitting
from topology.transports.base import Broker

log = logs.get()


class ShardSet:
    """All nodes of one worker.

    * `nodes` has one for each shard, by its number; which of them are owned changes with every assignment.
    * `splitting` and `anchoring` are there for a primary of several shards, and only then.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        role: Role,
        broker: Broker,
        data_dir: DataDir,
        openings: list[tuple[Opening, bytes]],
        ending: Ending,
        until_height: int | None = None,
    ) -> None:
        self.settings = settings
        self.role = role
        self.broker = broker
        self.data_dir = data_dir
        self.ending = ending
        self.generation: Generation = openings[0][0].generation
        self.splitting: Splitting | None = None
        self.anchoring: Anchoring | None = None
        self._abreast: Abreast | None = None
        self.archiving: list[Archiving] = []  # of a primary, by shard
        self._restoring: dict[int, tuple[Restoring, asyncio.Task[None]]] = {}
        self._proofs: dict[int, asyncio.Task[None]] = {}
        self._proving: Callable[[Node], Awaitable[None]] | None = None
        # Shards are for workers that each fill a core; one shard alone would leave the others idle.
        self._sealing = Sealing(beside=len(openings) == 1 and (os.cpu_count() or 1) > 1)
        self.prefetching: list[Prefetching] = []  # of a primary, by shard
        self.nodes = [
            Node(
                settings=settings,
                role=role,
                broker=broker,
                data_dir=data_dir.shard(opening.shard, self.generation.shards),
                opening=opening,
                opening_record=record,
                ending=ending,
                until_height=until_height,
            )
            for opening, record in openings
        ]
        if self.shards > 1 and role is Role.REPLICA:
            together = [node.committing for node in self.nodes]
            for committing in together:
                committing.kept_together = together
        if self.shards > 1 and role is Role.PRIMARY:
            self.anchoring = Anchoring(broker, self.generation)
            self._abreast = Abreast(self.nodes, broker, self.generation, self.anchoring)

    @property
    def shards(self) -> int:
        return self.generation.shards

    @property
    def owned(self) -> list[Node]:
        return [node for node in self.nodes if node.is_owned]

    def open(self, produce: Callable[[int], Produce], split: ProduceTo) -> None:
        """Open every store. ``produce``: for a shard's frames. ``split``: for what the splitter writes. Raises what
        `Node.open` raises; what was opened then is to be closed."""
        mine = {node.data_dir.store_path for node in self.nodes}
        for found in self.data_dir.shard_dirs:
            meta = None if found.store_path in mine else held_meta(found.store_path)
            if meta is not None:
                self.nodes[0].stored.check_generation(meta)  # another generation had other shards
        for node in self.nodes:
            node.open(produce(node.shard), self._sealing)
        if self.role is Role.PRIMARY:
            self.prefetching = [self._prefetching_of(node) for node in self.nodes]
            self.archiving = [Archiving(node) for node in self.nodes]
        if self.anchoring is not None:
            self.splitting = Splitting(broker=self.broker, generation=self.generation, produce=split)
            for node in self.nodes:
                node.committing.on_commit.append(self._anchor(node, self.anchoring))
                node.on_lead.append(self._anchor_first(node, self.anchoring))

    def _prefetching_of(self, node: Node) -> Prefetching:
        above_bytes = self.settings.prefetch_above_bytes
        return Prefetching(
            lambda: node.stored.store,
            node.data_dir.path / prefetching.FOLDER,
            prefetching.memory_share_bytes() if above_bytes is None else above_bytes,
        )

    async def on_blocks(self, shard: int, offset: int, record: bytes) -> None:
        """One record of the events of a shard, in order."""
        node = self.nodes[shard]
        session = node.session
        if self._abreast is not None:
            await self._abreast.wait(node, offset)
        if session == node.session:
            await node.on_blocks(offset, record)

    def event_comes(self, shard: int, record: bytes) -> None:
        """A record of events waits for the applier."""
        node = self.nodes[shard]
        if node.is_owned and not node.is_restoring:
            self.prefetching[shard].comes(record)

    def _anchor(self, node: Node, anchoring: Anchoring) -> Callable[[list[Step]], None]:
        def say(steps: list[Step]) -> None:
            if node.state is State.LEADING:
                anchoring.committed(node.shard, steps)

        return say

    def _anchor_first(self, node: Node, anchoring: Anchoring) -> Callable[[], None]:
        # Of what it followed up to here, whoever led before may not have come to say the last.
        return lambda: anchoring.stands(node.committed_meta)

    def close(self) -> None:
        self._sealing.close()
        for one in self.prefetching:
            one.close()
        for node in self.nodes:
            node.close()

    # Starting to follow

    async def start(self, owned: Iterable[int]) -> dict[tuple[str, int], int]:
        """Take these shards up and lay the others down: by topic and partition, where to read. After every assignment.

        It is short: stores are compared with the logs, and what is to be restored is only begun.
        """
        mine = set(owned)
        await self._stop_restoring([shard for shard in self._restoring if shard not in mine])
        for node in self.nodes:
            if node.shard not in mine:
                node.rest()
        nodes = [node for node in self.nodes if node.shard in mine]
        resumes: Sequence[Meta] = ()
        if self.anchoring is not None and nodes:
            resumes = await newest_resumes(self.settings.objects_url, self.generation)
        offsets = await asyncio.gather(*(self._start(node, resumes) for node in nodes))
        if self.shards > 1:
            log.info("shards_owned", shards=sorted(mine), of=self.shards)
        return {
            (topic, node.shard): offset
            for node, by_topic in zip(nodes, offsets, strict=True)
            for topic, offset in by_topic.items()
        }

    async def _start(self, node: Node, resumes: Sequence[Meta]) -> dict[str, int]:
        """Where to read what a shard needs; what it lacks of a snapshot, or of deleted records, is restored beside."""
        restoring, task = self._restoring.get(node.shard, (None, None))
        if restoring is not None and task is not None and not task.done():
            node.begin_session()
            return restoring.offsets
        meta, comes_and_goes = node.committed_meta, self.anchoring is not None and node.until_height is None
        if comes_and_goes and await floors.lacking(self.broker, self.generation, node.shard, meta, events=True):
            await node.start_behind()
        else:
            offsets = await node.start()
            if not lacks(node, resumes):
                return offsets
        resume = resumes[node.shard] if len(resumes) > node.shard else meta
        offsets = await floors.beginning(self.broker, self.generation, resume)
        restoring = Restoring(node, offsets, stop_proof=self._stop_proof, prove=self._prove)
        task = asyncio.create_task(restoring.run())
        task.add_done_callback(self._restored)
        self._restoring[node.shard] = (restoring, task)
        return restoring.offsets

    def _restored(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.fail(error)

    async def _stop_restoring(self, shards: Iterable[int]) -> None:
        given_up = {shard: self._restoring.pop(shard)[1] for shard in list(shards)}
        for task in given_up.values():
            task.cancel()
        await asyncio.gather(*given_up.values(), return_exceptions=True)
        for shard in given_up:
            if shard not in self._proofs:
                self._prove(self.nodes[shard])  # cancelled between the old store and the new one

    # Proving

    def prove_with(self, prove: Callable[[Node], Awaitable[None]]) -> None:
        """Prove every store in the background, and those that are restored later. ``prove``: one of them."""
        self._proving = prove
        for node in self.nodes:
            self._prove(node)

    def _prove(self, node: Node) -> None:
        assert self._proving is not None
        self._proofs[node.shard] = asyncio.ensure_future(self._proving(node))

    async def _stop_proof(self, node: Node) -> None:
        task = self._proofs.pop(node.shard)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """End what works in the background."""
        await self._stop_restoring(self._restoring)
        for shard in list(self._proofs):
            await self._stop_proof(self.nodes[shard])

    async def claim(self) -> None:
        """Claim every shard that has caught up."""
        await asyncio.gather(*(node.claim_if_caught_up() for node in self.owned))

    # Ending

    @property
    def stopping(self) -> asyncio.Event:
        return self.ending.stopping

    def fail(self, error: BaseException) -> None:
        self.ending.fail(error)

    @property
    def has_arrived(self) -> bool:
        """Whether every shard that is here is at the height at which the worker was to end."""
        owned = self.owned
        return bool(owned) and all(node.has_arrived for node in owned)

    async def refused(self) -> StateferryError | None:
        """Why a shard takes no event in, though it has read all there was."""
        for node in self.owned:
            if node.lead is not None and node.lead.refused is not None and node.has_consumed_all:
                if self.shards > 1 and not (await self._has_split_all() and node.has_consumed_all):
                    continue  # what mends it may be on its way
                return node.lead.refused
        return None

    async def is_idle(self, quiet_s: float, now_s: float) -> bool:
        """Whether everything there was is consumed, and nothing came for a while."""
        owned = self.owned
        if not owned or not all(node.has_consumed_all for node in owned):
            return False
        if any(now_s - node.last_progress_s < quiet_s for node in owned) or any(one.is_due for one in self.archiving):
            return False
        return self.shards == 1 or (await self._has_split_all() and all(node.has_consumed_all for node in owned))

    async def _has_split_all(self) -> bool:
        """Whether the splitter, if it is here, has passed on all there is. What it and the primaries of other workers
        wrote meanwhile counts from now on: every node has looked again where its topics end."""
        splits = self.splitting is not None and self.splitting.is_running
        if self.splitting is not None and splits:
            _, end = await self.broker.bounds(self.generation.blocks_topic, 0)
            if self.splitting.next_blocks < end or not self.splitting.has_sent_all:
                return False
        for node in self.owned:
            await node.look_at_ends()
        return splits or self.role is Role.REPLICA or len(self.owned) < self.shards

    # Being asked

    @property
    def stands_together(self) -> bool:
        """Whether the stores have one position."""
        return stand_together([node.committed_meta for node in self.nodes])

    @property
    def meta(self) -> Meta:
        """The position of all shards. Raises NotFound if they have none together."""
        self._check_all_here()
        return join_metas([node.committed_meta for node in self.nodes])

    def _check_all_here(self) -> None:
        if len(self.owned) < self.shards and not self.ending.stopping.is_set():
            owned = ", ".join(str(node.shard) for node in self.owned) or "none"
            raise NotFound(
                f"this worker has shards {owned} of {self.shards}, and not all",
                way_out="ask a replica, which holds all of them",
            )

    @property
    def proof(self) -> Proof:
        """Of the whole state: proven if every shard's is."""
        proofs = [node.stored.proof for node in self.nodes]
        return proofs[0] if len(proofs) == 1 else Proof(proven=all(proof.proven for proof in proofs))
