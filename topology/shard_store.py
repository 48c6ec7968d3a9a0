"""One shard's store in its directory, open: with the replica that writes to it, and what is proven of it.

A store that is opened must be of the generation in force. Another one may be put in its place while the worker runs
(`restoring`): whoever works with the store across an await holds `in_use`.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.errors import GenerationEnded
from pipeline.frame import digest_of
from pipeline.generation import Opening
from pipeline.position import Meta, decode_meta, encode_meta
from pipeline.replica import Replica
from pipeline.stores.base import META_KEY, PROOF_KEY, ROLE_KEY, Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import Proof, decode_proof, encode_proof
from topology import logs, topics
from topology.data_dir import DataDir
from topology.ending import Ending

log = logs.get()


class Role(enum.Enum):
    PRIMARY = "primary"
    REPLICA = "replica"


class ShardStore:
    """A store, from `open` to `close`.

    * `store`, `replica` and `committed` are there once it was opened; after `close` they tell where it stood.
    * `committed` is the position of the store itself: what reads are answered at. `replica.meta` may be ahead of it.
    """

    def __init__(self, *, role: Role, data_dir: DataDir, opening: Opening, opening_record: bytes) -> None:
        self.data_dir = data_dir
        self.is_open = False
        self.store: RocksStore
        self.replica: Replica
        self.committed: Meta
        self.proof = Proof(proven=False)
        self.in_use = asyncio.Lock()
        self._role = role
        self._opening = opening
        self._opening_record = opening_record

    def open(self) -> None:
        """Raises WrongChain, GenerationEnded, and what the store raises."""
        self.store = RocksStore(self.data_dir.store_path)
        try:
            self._load()
        except BaseException:
            self.store.close()
            raise
        self.is_open = True
        log.info(
            "node_opened",
            role=self._role.value,
            proof="proven" if self.proof.proven else "claimed",
            **self.where(),
        )

    def _load(self) -> None:
        """The position of the store that was opened, or of a new one."""
        data = self.store.get_meta(META_KEY)
        if data is None:
            # Nothing was read and nothing is here: the empty state needs no proof.
            meta = self.base_meta()
            proof = Proof(proven=meta.tip.ref is None, at=None, root=meta.tip.root)
            self.store.write(Batch(meta={META_KEY: encode_meta(meta), PROOF_KEY: encode_proof(proof)}))
        else:
            meta = decode_meta(data)
        self.check_generation(meta)
        if meta.seq == 0 and meta.diffs.next_offset == 0:
            # A base state, published before the opening was: it takes finality from there.
            meta = replace(self.base_meta(), tip=meta.tip)
            self.store.write(Batch(meta={META_KEY: encode_meta(meta)}))
        if self.store.get_meta(ROLE_KEY) != self._role.value.encode():
            self.store.write(Batch(meta={ROLE_KEY: self._role.value.encode()}))
        self.proof = decode_proof(self.store.get_meta(PROOF_KEY))
        self.replica = Replica(self.store, meta, archives=self._role is Role.PRIMARY)
        self.committed = meta

    def base_meta(self) -> Meta:
        """Where a store stands that has read the opening, and nothing else."""
        return self._opening.meta(offset=0, digest=digest_of(self._opening_record))

    def check_generation(self, meta: Meta) -> None:
        """What a store here holds must be of the generation in force. Raises WrongChain, GenerationEnded."""
        generation = self._opening.generation
        topics.check_chain(meta.chain_id, generation.chain_id, str(self.data_dir.path))
        if meta.generation != generation.generation:
            raise GenerationEnded(
                f"this data directory holds generation {meta.generation.hex()}, the broker has "
                f"{generation.generation.hex()}",
                where=str(self.data_dir.path),
                way_out="restore the new generation into an empty data directory: `stateferry restore`",
            )

    def replace(self, put_in_place: Callable[[], None]) -> None:
        """Go on with another store, which ``put_in_place`` moves to where this one is; `in_use` is held."""
        self.is_open = False
        self.store.close()
        put_in_place()
        self.open()

    def close(self, commit: Callable[[], None], ending: Ending) -> None:
        """Write what the log confirmed, forget the rest. Trouble goes to ``ending``; behind a failure nothing is
        written."""
        if not self.is_open:
            return
        self.is_open = False
        try:
            if ending.failure is None:
                commit()
            self.store.flush()
        except Exception as error:
            ending.add(error)
        try:
            self.store.close()
        except Exception as error:
            ending.add(error)  # a store whose disk is full can be neither flushed nor closed
        log.info("node_closed", height=self.replica.meta.tip.height, seq=self.replica.meta.seq)

    def where(self) -> dict[str, Any]:
        """For logs and evidence: the position of all that was accepted."""
        tip = self.replica.meta.tip
        return {
            "height": tip.height,
            "block_hash": tip.block_hash[::-1].hex(),
            "root": tip.root.hex(),
            "generation": self._opening.generation.generation.hex(),
            "data_dir": str(self.data_dir.path),
        }
