"""`stateferry trace`: where a key's value came from, and what a block did."""

from __future__ import annotations

import itertools
import re
from typing import Any

import click

from pipeline.apply import describe_key
from pipeline.archive_names import SegmentName
from pipeline.errors import NotFound, UsageError
from pipeline.frame import Header
from pipeline.objects import open_objects
from pipeline.state import UTXO, Change, schema_named
from topology import reads
from topology.commands.common import common_options, emit, rows
from topology.settings import Settings
from topology.tracer import Tracer, including

_HEIGHTS = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")
_SPAN_MAX = 100_000
_KEYS_MAX = 1000


@click.command()
@click.argument("what", metavar="KEY|HEIGHT|FIRST-LAST")
@click.option("--table", default=UTXO.name, show_default=True, help="Of a key.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=_KEYS_MAX, show_default=True, help="Keys of a block."
)
@common_options
def trace(settings: Settings, what: str, table: str, limit: int, as_json: bool) -> None:
    """Every archived change of a key (txid:index for coins): its block, event, frame, segment, range diffs, and the
    snapshots that hold the key. Of a height: the same of its block, and the keys. Of heights: a line each.

    From the object store alone, by names, manifests, indexes and filters; of frames, those that are told.
    """
    tracer = Tracer(open_objects(settings.objects_url), settings.chain or None)
    heights = _HEIGHTS.fullmatch(what)
    if heights is None:
        document = _key(tracer, table, what)
    elif heights[2] is None:
        document = _height(tracer, int(heights[1]), limit)
    else:
        document = _span(tracer, int(heights[1]), int(heights[2]))
    document["read"] = dict(tracer.read)
    emit(document, as_json=as_json, text=lambda: _text(document))


def _key(tracer: Tracer, table: str, text: str) -> dict[str, Any]:
    schema = schema_named(table)
    key = reads.parse_key(schema, text)
    touches = tracer.changes(schema, key)
    holders = tracer.holders(schema, key, touches)
    if not touches and not any(holder.holds is not False for holder in holders):
        raise NotFound(f"nothing that is archived or in a snapshot touches {schema.name} {text}")
    return {
        "table": schema.name,
        "key": describe_key(schema, key),
        "changes": [_block(tracer, one.segment, one.header) | _change(one.change) for one in touches],
        "snapshots": [
            {
                "height": holder.name.height,
                "manifest": str(holder.name),
                "part": None if holder.part is None else holder.part.name,
                "holds": holder.holds,
            }
            for holder in sorted(holders, key=lambda holder: holder.name.height)
            if holder.holds is not False
        ],
    }


def _height(tracer: Tracer, height: int, limit: int) -> dict[str, Any]:
    blocks = []
    for index, entry in tracer.entries(height, height):
        header, diff = tracer.block(index, entry)
        keys = ((table.schema, change) for table in diff.tables.values() for change in table.changes())
        blocks.append(
            _block(tracer, index.name, header)
            | {
                "op_count": diff.op_count,
                "keys": [
                    {"table": schema.name, "key": describe_key(schema, change.key)} | _change(change)
                    for schema, change in itertools.islice(keys, limit)
                ],
                "snapshots": [
                    {"height": name.height, "manifest": str(name)}
                    for name in including(tracer.manifests, index.name.generation, height)
                ],
            }
        )
    if not blocks:
        raise NotFound(f"the archive has no block of height {height}")
    return {"height": height, "blocks": blocks}


def _span(tracer: Tracer, first: int, last: int) -> dict[str, Any]:
    if not 0 <= last - first < _SPAN_MAX:
        raise UsageError(f"{first}-{last} are no {_SPAN_MAX:,} heights or fewer in ascending order")
    blocks = [
        {
            "height": entry.ref.height,
            "block_hash": entry.ref.block_hash[::-1].hex(),
            "root": entry.post_root.hex(),
            "frame_id": entry.frame_id.hex(),
            "segment": str(index.name),
        }
        for index, entry in tracer.entries(first, last)
    ]
    if not blocks:
        raise NotFound(f"the archive has no block of heights {first} to {last}")
    return {
        "first_height": first,
        "last_height": last,
        "blocks": blocks,
        "range_diffs": [str(name) for name in tracer.ranges if name.first <= last and first <= name.last],
        "snapshots": [
            {"height": name.height, "manifest": str(name)}
            for name in sorted(tracer.manifests, key=lambda name: name.height)
            if first <= name.height <= last
        ],
    }


def _block(tracer: Tracer, segment: SegmentName, header: Header) -> dict[str, Any]:
    return {
        "height": header.ref.height,
        "block_hash": header.ref.block_hash[::-1].hex(),
        "block_time_s": header.block_time_s,
        "generation": header.generation.hex(),
        "shard": header.shard,
        "event_offset": header.next_input_offset - 1,
        "walk": header.walk,
        "seq": header.seq,
        "frame_id": header.frame_id.hex(),
        "segment": str(segment),
        "range_diffs": [str(name) for name in tracer.ranges_over(segment, header.ref.height)],
    }


def _change(change: Change) -> dict[str, Any]:
    kind = "created" if change.before is None else "deleted" if change.after is None else "updated"
    return {
        "change": kind,
        "before": None if change.before is None else change.before.hex(),
        "after": None if change.after is None else change.after.hex(),
    }


def _text(document: dict[str, Any]) -> str:
    marks = {"created": "+", "deleted": "-", "updated": "~"}
    flat = {name: value for name, value in document.items() if not isinstance(value, list)}
    parts = [rows(flat)]
    if "first_height" in document:
        parts.append("\n".join(f"{one['height']}  {one['block_hash']}  {one['root']}" for one in document["blocks"]))
        return "\n\n".join(parts)
    for one in document.get("changes") or document.get("blocks", ()):
        shown = {name: value for name, value in one.items() if name not in ("keys", "snapshots") and value != []}
        keys = [f"  {marks[key['change']]} {key['table']} {key['key']}" for key in one.get("keys", ())]
        held = [f"  in the snapshot of height {name['height']}" for name in one.get("snapshots", ())]
        parts.append("\n".join([rows(shown), *keys, *held]))
    for one in document.get("snapshots", ()):
        words = "held by" if one["holds"] else "perhaps held by"
        parts.append(f"{words} the snapshot of height {one['height']}, {one['part']}")
    return "\n\n".join(parts)
