"""Commands about a store: `status`, `get`, `scan`, `root`, `snapshot`. A running worker is asked."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import click

from pipeline.errors import UsageError
from pipeline.generation import Generation
from pipeline.objects import open_objects
from pipeline.position import Meta
from pipeline.snapshot import parse_manifest_name
from pipeline.state import UTXO, schema_named
from pipeline.verify import Proof
from topology import answers, lag, reads
from topology.commands.common import (
    ask_broker,
    ask_worker,
    common_options,
    emit,
    opened_view,
    opened_views,
    owned_stores,
    rows,
    serve_option,
)
from topology.data_dir import DataDir
from topology.settings import Settings
from topology.shard_store import Role
from topology.transports.base import log_path

_SCAN_LIMIT = 100
_STATUS_S = 10.0
"""A worker that has not said by then where it stands is not well."""


@click.command()
@common_options
def status(settings: Settings, as_json: bool) -> None:
    """Where this node stands: position, proof, epoch, offsets, snapshots; each shard's lag, owner and buffers.

    Without a running worker it says what the store holds, and how far the broker is ahead of it, if one answers.
    """
    document = ask_worker(settings, {"what": "status"}, timeout_s=_STATUS_S)
    if document is None:
        with opened_views(settings) as views:
            metas, role = [view.meta for view in views], views[0].role
            proof = views[0].proof if len(views) == 1 else Proof(proven=all(view.proof.proven for view in views))
        document = reads.standing(metas, proof) | {"running": False, "role": role or None}
        document["shards"] = [reads.shard(meta) | {"owner": None} | _behind(settings, meta, role) for meta in metas]
    document["snapshots"] = _snapshots(settings, document["chain"])
    document["audits"] = DataDir(settings.data_dir).audits()
    emit(document, as_json=as_json, text=lambda: _status_text(document))


def _behind(settings: Settings, meta: Meta, role: str) -> dict[str, Any]:
    """How far a store that no worker has is behind a broker that can be reached."""
    if not settings.broker and not log_path(settings.broker_url).exists():
        return {"lag": None, "lag_unknown": "no broker is named", "topics": {}}
    found = Generation(
        generation=meta.generation, chain_id=meta.chain_id, number=meta.generation_number, shards=meta.shards
    )
    stands = {"diffs": lag.diffs_stand(meta, found.diffs_topic, meta.shard)}
    if role == Role.PRIMARY.value:
        stands["blocks"] = lag.blocks_stand(meta, found.events_topic, meta.shard)
    return ask_broker(settings, lambda broker: answers.behind(broker, stands, settings.topic_prefix))


def _status_text(document: dict[str, Any]) -> str:
    """The node's position, then each shard below it."""
    flat = {name: value for name, value in document.items() if name not in ("shards", "snapshots", "audits")}
    snapshots = [f"{one['height']} {one['root']}" for one in document["snapshots"]]
    audits = {
        f"verified {level}": f"{one['at']}: " + ("passed" if one["verified"] else f"{one['faults']} faults")
        for level, one in document["audits"].items()
    }
    parts = [rows(flat | {"snapshots": ", ".join(snapshots) or "none"} | audits)]
    for shard in document["shards"]:
        behind = shard["lag"]
        shown = {
            f"shard {shard['shard']} of {shard['shards']}": f"height {shard['height']}, seq {shard['seq']}",
            "lag": f"{behind['blocks']} blocks, {behind['seconds']:.1f} s" if behind else shard["lag_unknown"],
            "owner": shard["owner"] or "no running worker",
            "epoch": f"{shard['epoch']}, writer {shard['writer']}" + (", this one" if shard.get("in_force") else ""),
        }
        for one in shard["topics"].values():
            place = f"{one['topic']}[{one['partition']}]"
            shown[place] = f"{one['next_offset']} of {one['end_offset']} records"
        if "buffers" in shard:
            shown["frames in flight"] = shard["frames_in_flight"]
            shown["void records"] = shard["void_records"] or 0
            for name, held in shard["buffers"].items():
                shown[f"buffer {name}"] = f"{held['bytes']:,} of {held['bytes_max']:,} bytes"
        parts.append(rows(shown))
    return "\n\n".join(parts)


def _snapshots(settings: Settings, chain: str) -> list[dict[str, Any]]:
    """Positions of the snapshots in the object store, newest last."""
    names = (parse_manifest_name(info.name) for info in open_objects(settings.objects_url).list(f"{chain}/"))
    found = sorted((name for name in names if name is not None), key=lambda name: name.height)
    return [
        {"height": name.height, "root": name.root_start.hex(), "generation": name.generation.hex()} for name in found
    ]


@click.command()
@click.argument("keys", nargs=-1, required=True)
@click.option("--table", default=UTXO.name, show_default=True)
@serve_option
@common_options
def get(settings: Settings, keys: tuple[str, ...], table: str, as_json: bool) -> None:
    """Values of KEYS (txid:index for coins), with the position they are read at."""
    schema = schema_named(table)
    answer = ask_worker(settings, {"what": "get", "table": table, "keys": list(keys), "serve": settings.serve})
    if answer is None:
        with opened_view(settings) as view:
            reads.check_serving(view.proof, settings.serve)
            answer = {
                "position": reads.position(view.meta, view.proof),
                "found": reads.get(view.store, schema, list(keys)),
            }
    emit(answer, as_json=as_json, text=lambda: "\n\n".join(rows(_flat(found)) for found in answer["found"]))


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    coin = found.get("coin")
    return {"key": found["key"], **coin} if coin else found


@click.command()
@click.option("--table", default=UTXO.name, show_default=True)
@click.option("--prefix", default="", metavar="HEX", help="Of the whole key, in hashing order.")
@click.option("--txid", default="", help="Coins of one transaction, its id as people write it.")
@click.option("--after", default="", metavar="KEY", help="Go on behind this key: the `next` of the page before.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=_SCAN_LIMIT, show_default=True)
@serve_option
@common_options
def scan(settings: Settings, table: str, prefix: str, txid: str, after: str, limit: int, as_json: bool) -> None:
    """A page of keys and values, in storage order, all at one position."""
    schema = schema_named(table)
    try:
        start = bytes.fromhex(txid)[::-1] if txid else bytes.fromhex(prefix)
    except ValueError as error:
        raise UsageError(f"a prefix is hex: {error}") from error
    behind = reads.parse_key(schema, after) if after else None
    with opened_view(settings) as view:
        reads.check_serving(view.proof, settings.serve)
        page = list(itertools.islice(reads.scan(view.store, schema, prefix=start, after=behind), limit + 1))
        found = [reads.show(schema, key, value) for key, value in page[:limit]]
        document = {
            "position": reads.position(view.meta, view.proof),
            "found": found,
            "next": found[-1]["key"] if len(page) > limit else None,
        }
    emit(document, as_json=as_json, text=lambda: "\n".join(one["key"] for one in found))


@click.command()
@click.option("--interop", type=click.Choice(["muhash"]), help="A root that other software computes too.")
@common_options
def root(settings: Settings, interop: str | None, as_json: bool) -> None:
    """The root at the store's position; with --interop muhash, what `gettxoutsetinfo muhash` prints there."""
    with opened_view(settings) as view:
        document = reads.position(view.meta, view.proof) | {
            "coins": view.meta.tip.counts.get(UTXO.table_id, 0),
            "table_roots": {str(table_id): root.hex() for table_id, root in view.meta.tip.table_roots.items()},
        }
        if interop == "muhash":
            document["muhash"] = reads.muhash(view.store)
    emit(document, as_json=as_json, text=lambda: rows(document))


@click.command()
@click.option("--height", type=int, help="A final height that this node's journal still reaches. [default: the newest]")
@click.option("--cancel", is_flag=True, help="End those that the running worker takes now.")
@common_options
def snapshot(settings: Settings, height: int | None, cancel: bool, as_json: bool) -> None:
    """Publish the state at a final height; the primary's open archive segment goes out first.

    A worker takes them by itself with STATEFERRY_SNAPSHOT_BLOCKS, ..._ARCHIVED_BYTES or ..._SECONDS.
    """
    if cancel:
        ended = ask_worker(settings, {"what": "cancel-snapshot"}) or {"cancelled": 0}
        emit(ended, as_json=as_json, text=lambda: rows(ended))
        return
    document = ask_worker(settings, {"what": "snapshot", "height": height})
    if document is None:
        with owned_stores(settings) as (data_dir, stores):
            for store, _ in stores:
                answers.flush_archive(store, settings.objects_url)
            shards = [store for store, _ in stores]
            document = asyncio.run(answers.snapshot(shards, data_dir, settings, height))
    emit(document, as_json=as_json, text=lambda: rows(document))
