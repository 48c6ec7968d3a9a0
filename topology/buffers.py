"""What every buffer of a node holds, and its bound: the memory of a worker, told in `status`."""

from __future__ import annotations

from typing import NamedTuple

from pipeline import chunk
from pipeline.stores.rocksdb import BLOCK_CACHE_BYTES, MEMTABLES_BYTES_MAX
from topology.node import Node


class Held(NamedTuple):
    """What a buffer holds, and its bound."""

    bytes: int
    bytes_max: int


def held_by(node: Node) -> dict[str, Held]:
    """By the buffer's name. A bound is looked at before a block is taken in: one may stand above it."""
    lead, settings, replica, memory = node.lead, node.settings, node.stored.replica, node.stored.store.memory()
    dirty_bytes = replica.layers.dirty_bytes
    held = {
        "group": Held(replica.group_bytes, settings.group_bytes_max),
        "frame_chunks": Held(replica.reader.held_bytes, chunk.MESSAGE_BYTES_MAX),
        "memtables": Held(memory.memtables_bytes, MEMTABLES_BYTES_MAX),
        "block_cache": Held(memory.block_cache_bytes, BLOCK_CACHE_BYTES),
    }
    if lead is None:
        return held | {"dirty_layers": Held(dirty_bytes, settings.group_bytes_max)}
    return held | {
        "computed_ahead": Held(lead.ahead_bytes, settings.ahead_bytes_max),  # the next two together
        "dirty_layers": Held(dirty_bytes, settings.ahead_bytes_max),
        "frames_in_flight": Held(lead.proposed_bytes, settings.ahead_bytes_max),
        "event_chunks": Held(lead.held_event_bytes, chunk.MESSAGE_BYTES_MAX),
    }
