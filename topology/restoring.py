"""A shard that comes to a worker which lacks its state: restored beside, while the worker's other shards go on.

A helper process makes the store in `renewing/` of the shard's directory, from the newest snapshot and the archive
(`restorer`). Records of the shard wait meanwhile, from the offsets at which the snapshot goes on. Then that store takes
the place of the one that is here, claimed, and is proven as any restored one is. Whatever goes wrong with the object
store costs time and nothing else: the frames are then followed from where the old store stands.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence

from pipeline.errors import StateferryError
from pipeline.generation import Generation
from pipeline.objects import open_objects
from pipeline.position import Meta
from topology import base_state, children, logs, renewal, topics
from topology.data_dir import DataDir
from topology.node import Node
from topology.signing import required_signer

log = logs.get()

LACKED_MIN = 256
"""Frames: a store that lacks fewer of the newest snapshot's follows them. Some seconds of work on large blocks."""
_LOOK_S = 20.0
"""For the object store to say what it has. Nothing flows meanwhile, and the group waits 90 s at most."""


async def newest_resumes(objects_url: str, generation: Generation) -> Sequence[Meta]:
    """Where the newest snapshot goes on from, by shard; nothing if there is none, or if the object store does not say
    so in time."""

    def look() -> Sequence[Meta]:
        return base_state.newest_manifest(open_objects(objects_url), generation, None).resumes

    try:
        return await asyncio.wait_for(asyncio.to_thread(look), _LOOK_S)
    except (StateferryError, TimeoutError):
        return ()


def lacks(node: Node, resumes: Sequence[Meta]) -> bool:
    """Whether a shard is to be restored, and not followed. Who is to end at a height follows: a restore may lead
    beyond."""
    if node.until_height is not None or len(resumes) <= node.shard:
        return False
    return resumes[node.shard].seq - node.committed_meta.seq >= LACKED_MIN


class Restoring:
    """One shard that is being restored.

    * `offsets` are the same, whoever assigns it again meanwhile.
    """

    def __init__(
        self,
        node: Node,
        offsets: dict[str, int],
        *,
        stop_proof: Callable[[Node], Awaitable[None]],
        prove: Callable[[Node], None],
    ) -> None:
        """``stop_proof``: of the store that is here. ``prove``: the one that takes its place."""
        self.offsets = offsets
        self._node = node
        self._stop_proof = stop_proof
        self._prove = prove
        node.wait_for_store()

    async def run(self) -> None:
        """To the end, whether it is restored or followed. Raises what following raises."""
        node, started_s = self._node, time.monotonic()
        renewed = DataDir(node.data_dir.path / renewal.WORK_FOLDER)
        try:
            if renewed.has_store:
                shutil.rmtree(renewed.path)  # whole, and of who knows when: it was never put in its place
            renewed.create()
            await children.run_in_turn("topology.restorer", self._arguments(renewed))
        except StateferryError as error:
            log.warning("shard_not_restored", shard=node.shard, error=error.name, message=str(error))
            await self._follow()
        else:
            await self._stop_proof(node)
            await node.take_store(lambda: renewal.replace_stores(node.data_dir))
            self._prove(node)
            log.info(
                "shard_restored",
                shard=node.shard,
                height=node.committed_meta.tip.height,
                seconds=round(time.monotonic() - started_s, 3),
            )
        await node.go_on()

    def _arguments(self, renewed: DataDir) -> list[str]:
        node = self._node
        signer = required_signer(node.settings)
        return [
            *(() if signer is None else ("--signer", signer.hex())),
            *("--objects", node.settings.objects_url, "--data-dir", str(renewed.path)),
            *("--chain", node.generation.chain_id, "--generation", node.generation.generation.hex()),
            *("--shard", str(node.shard)),
        ]

    async def _follow(self) -> None:
        """The frames up to where the stream goes on."""
        node, topic = self._node, self._node.generation.diffs_topic
        async for record in topics.records(node.broker, topic, node.following.next_offset, partition=node.shard):
            if record.offset >= self.offsets[topic]:
                return
            await node.follow_record(node.session, record.offset, record.value)
            await asyncio.sleep(0)  # the other shards go on
