"""`bench wire`: bytes that a change costs on the way to a replica, in every encoding that one might think of.

Rows of one load: the frame as it goes onto the topic (references, header and all), the same frame as the archive keeps
it (whole keys, before- and after-values), and what a plain encoding of the netted changes costs (whole keys, values of
what is created, nothing of what is deleted), bare and with zstd-3. The baseline of all is JSON with zstd-3.
`hash-bytes` are the transaction hashes alone: no encoding that names keys whole can go below.

`on-embedded-log` and, with `--broker`, `on-kafka` are what the frame takes on the broker's disk: its records in batches
of their own, as they come at the tip of a chain.

`encode_share` is what making the frame takes of the time of applying the block.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgpack

from pipeline import delta, frame
from pipeline.block import Block
from pipeline.codec import Codec, compress
from pipeline.diff import decode_whole_body
from pipeline.state import UTXO
from pipeline.stores.memory import MemoryStore
from pipeline.table_diff import TableDiff
from topology.bench import loads
from topology.bench.apply import WIRE, Applier
from topology.bench.processes import new_place
from topology.bench.report import Row
from topology.bench.topic_bytes import appended_bytes
from topology.bench.workers import Worker

SIZES = (2_000, 5_000)
BLOCKS = 30
"""Of a synthetic load; the last third of them is counted, when old coins are there to be spent."""
REPEATS = 20
_BASELINE = "json+zstd-3"


def run(
    *, blocks: int = BLOCKS, sizes: Sequence[int] = SIZES, repeats: int = REPEATS, data: Path, broker: str = ""
) -> list[Row]:
    rows: list[Row] = []
    for height in (367_891, 300_025):
        real = loads.real_block(height, data)
        if real is not None:
            rows += load_rows(f"block-{height}", [real.block], 0, real, repeats, broker)
    for size in sizes:
        made = list(loads.synthetic_blocks(blocks, size))
        rows += load_rows(f"synthetic-{size}", made, 2 * blocks // 3, None, repeats, broker)
    return rows


def load_rows(
    name: str, blocks: Sequence[Block], skip: int, real: loads.RealBlock | None, repeats: int, broker: str
) -> list[Row]:
    """All encodings of the blocks from ``skip`` on. ``real``: the base that the only block stands on."""
    replica = loads.open_replica(MemoryStore(), real)
    primary = loads.ReadBack(replica)
    archived_bytes = 0
    records: list[bytes] = []
    diffs: list[TableDiff] = []
    for walk, block in enumerate(blocks, 1):
        proposal = primary.commit(loads.event_of(block, walk))
        if walk > skip:
            records += proposal.records
            archived_bytes += len(proposal.step.whole)
            diffs.append(frame_diff(proposal.step.whole))
    sizes: dict[str, int] = {"frame": sum(map(len, records)), "archived": archived_bytes}
    with tempfile.TemporaryDirectory(prefix="stateferry-bench-") as folder:
        sizes["on-embedded-log"] = appended_bytes(new_place("", Path(folder)), records)
    if broker:
        sizes["on-kafka"] = appended_bytes(new_place(broker, Path()), records)
    for encoding, encode in _ENCODINGS.items():
        raws = list(map(encode, diffs))
        sizes[encoding] = sum(map(len, raws))
        sizes[f"{encoding}+zstd-3"] = sum(len(compress(raw, Codec.ZSTD)) for raw in raws)
    sizes["hash-bytes"] = sum(map(_hash_bytes, diffs))
    changes = sum(map(len, diffs))
    share = encode_share(blocks, real, repeats)
    return [
        Row(
            name=f"{name}/{encoding}",
            measures={"bytes_per_change": size / changes} | ({"encode_share": share} if encoding == "frame" else {}),
            baseline="" if encoding == _BASELINE else f"{name}/{_BASELINE}",
            ratio=None if encoding == _BASELINE else sizes[_BASELINE] / size,
        )
        for encoding, size in sizes.items()
    ]


def frame_diff(whole: bytes) -> TableDiff:
    """What a whole frame changes in the `utxo` table."""
    return decode_whole_body(frame.decode(whole).body).tables[UTXO.table_id]


def encode_share(blocks: Sequence[Block], real: loads.RealBlock | None, repeats: int) -> float:
    """Seconds of making frames over seconds of applying, as `bench apply` measures both."""
    events = [loads.event_of(block, walk) for walk, block in enumerate(blocks, 1)]
    with (
        tempfile.TemporaryDirectory(prefix="stateferry-bench-") as folder,
        Worker(partial(Applier, alone=True), Path(folder), real) as worker,
    ):
        total_s: float = worker.ask(events * repeats if real is not None else events).wall_s
        stages, _ = worker.ask(None)
    return float(stages[WIRE] / total_s)


def _json(diff: TableDiff) -> bytes:
    changes = [{"key": key.hex(), "value": after and after.hex()} for key, _, after in diff.changes()]
    return json.dumps(changes, separators=(",", ":")).encode()


def _msgpack(diff: TableDiff) -> bytes:
    packed: bytes = msgpack.packb([(key, after) for key, _, after in diff.changes()], use_bin_type=True)
    return packed


def _grouped(diff: TableDiff) -> bytes:
    """The frame's own columns, with every key whole: what it would be without references."""
    every_key = frozenset(diff.updated_keys) | frozenset(diff.deleted_keys)
    return delta.encode_references(diff, every_key)


_ENCODINGS: dict[str, Callable[[TableDiff], bytes]] = {
    "json": _json,
    "msgpack": _msgpack,
    "grouped-whole-keys": _grouped,
}


def _hash_bytes(diff: TableDiff) -> int:
    keys = (*diff.created_keys, *diff.updated_keys, *diff.deleted_keys)
    return UTXO.route_bytes * len({key[: UTXO.route_bytes] for key in keys})
