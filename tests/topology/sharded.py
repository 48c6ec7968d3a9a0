"""Sites whose state is in several shards, and what must hold of their nodes."""

from __future__ import annotations

from pathlib import Path

from pipeline import chunk, frame
from pipeline.anchors import AnchorBook
from pipeline.generation import decode_generation
from pipeline.position import Meta, decode_meta
from pipeline.shards import join_metas
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
from tests.topology.commands import Site

ROOT_199 = "99dc5a5a61e5a2e7fe524d6992d7a9aa493651b61f292773c80d51bf90e7a43c"
ROOT_299 = "91d3b889e617757b573e7c272c28fa3066670147b4c31ba0215128f0aa3cfd6b"
ROOT_599 = "e0140eb8e20b59ae7f8b9b686980d71e6f26736e1af18d479069dde72aa00ae6"
"""Of the first 200, 300, and 600, blocks of Bitcoin, in a run with one shard."""


class Sharded(Site):
    """A site whose generation has one shard or several."""

    shards = 2

    def begin(self, shards: int) -> Sharded:
        self.shards = shards
        self.here("topics", "create", "--shards", shards).ok()
        return self

    def store_path(self, node: str, shard: int) -> Path:
        return self.dir(node) / ("store" if self.shards == 1 else f"shards/{shard:02d}/store")

    def metas(self, node: str) -> list[Meta]:
        """Of each shard's store, while no worker has it."""
        metas = []
        for shard in range(self.shards):
            store = RocksStore(self.store_path(node, shard), read_only=True)
            data = store.get_meta(META_KEY)
            store.close()
            assert data is not None
            metas.append(decode_meta(data))
        return metas

    def meta(self, node: str) -> Meta:
        return join_metas(self.metas(node))

    def content(self, node: str) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for shard in range(self.shards):
            store = RocksStore(self.store_path(node, shard), read_only=True)
            found |= dict(store.scan())
            store.close()
        return found

    def partitions(self, topic: str) -> list[list[bytes]]:
        with self.opened_log() as log:
            return [[record.value for record in log.read(topic, shard)] for shard in range(self.shards)]

    def valid_ids(self) -> list[list[str]]:
        """Ids of each shard's frames, in the order of their seqs; those written twice must be the same."""
        found = []
        for records in self.partitions("diffs"):
            ids: dict[int, str] = {}
            for record in records:
                if chunk.is_chunk(record):
                    continue
                header = frame.peek(record)
                if header.is_numbered:
                    assert ids.setdefault(header.seq, header.frame_id.hex()) == header.frame_id.hex()
            found.append([ids[seq] for seq in sorted(ids)])
        return found

    def anchored(self) -> dict[int, str]:
        """The global roots that follow from the anchors, by height."""
        with self.opened_log() as log:
            generation = decode_generation(log.read("generations")[0].value)
            records = [record.value for record in log.read("anchors")]
        book = AnchorBook(generation.generation, self.shards)
        joined = [found for record in records if (found := book.feed(record)) is not None]
        return {one.tip.height: one.tip.root.hex() for one in joined}


def same(site: Sharded, nodes: list[str]) -> None:
    """Nodes stand at one position in every shard, and hold the same bytes."""
    first, *others = nodes
    metas, content = site.metas(first), site.content(first)
    for other in others:
        for meta, found in zip(metas, site.metas(other), strict=True):
            assert (found.tip, found.seq, found.frame_id, found.walk) == (meta.tip, meta.seq, meta.frame_id, meta.walk)
        assert site.content(other) == content


def leading(site: Sharded, node: str) -> list[int]:
    """The shards that a worker leads; none if it ends just now."""
    done = site.here("status", node=node)
    return [] if done.code else [one["shard"] for one in done.document["shards"] if one.get("in_force")]


def heights(site: Sharded, node: str) -> dict[int, int]:
    """Of the shards that a worker owns; none if it ends just now."""
    done = site.here("status", node=node)
    return {} if done.code else {one["shard"]: one["height"] for one in done.document["shards"]}


def more(site: Sharded, height: int, blocks: int) -> None:
    site.here("ingest", "synthetic", "--from-height", height, "--blocks", blocks, "--changes", 60).ok()
