"""`stateferry frame`: archived frames, segments and range diffs as files, no broker and no store needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from pipeline import frame
from pipeline.apply import describe_key
from pipeline.audits import check_range
from pipeline.block import BlockRef
from pipeline.diff import Diff, decode_whole_body, join_tables, squash
from pipeline.errors import FrameCorrupt, FrameIdMismatch, UsageError
from pipeline.frame import Feature, Frame, Header, Kind
from pipeline.ranges import RangeDiff
from pipeline.state import SCHEMAS
from pipeline.table_diff import TableDiff
from topology import logs
from topology.commands.archived_files import read_archived, read_frames
from topology.commands.common import emit, rows

_Files = click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
_Json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_Height = click.option("--height", type=int, help="Only the block at this height.")


@click.group("frame")
def frames() -> None:
    """Archived frames: FILES are segments (.seg) or single frames; for dump and verify also range diffs (.rng)."""
    logs.configure(verbose=False)


class _Link(NamedTuple):
    """What leads from one block to another: a frame, or a range diff."""

    first: int
    parent: bytes
    prev_root: bytes
    ref: BlockRef
    post_root: bytes

    @classmethod
    def of(cls, one: Header | RangeDiff) -> _Link:
        if isinstance(one, RangeDiff):
            return cls(one.name.first, one.parent, one.prev_root, one.ref, one.resume.tip.root)
        return cls(one.ref.height, one.parent_hash, one.prev_root, one.ref, one.post_root)


def _check_follows(before: _Link, after: _Link) -> None:
    """Raises FrameCorrupt."""
    if (after.parent, after.prev_root) != (before.ref.block_hash, before.post_root):
        raise FrameCorrupt(f"what leads to block {after.ref} does not follow block {before.ref}")


def _whole(data: bytes) -> tuple[Frame, Diff]:
    decoded = frame.decode(data)
    if Feature.SELF_CONTAINED not in decoded.header.required:
        raise UsageError(
            "this is a frame of the topic, which needs the state before it",
            way_out="use the archived frame of the same block",
        )
    return decoded, decode_whole_body(decoded.body)


def _check_id(decoded: Frame, diff: Diff) -> None:
    computed = frame.frame_id(decoded.header, diff.encode().digests)
    if computed != decoded.header.frame_id:
        raise FrameIdMismatch(
            f"id {decoded.header.frame_id.hex()} is claimed, {computed.hex()} was computed",
            where=f"block {decoded.header.ref}",
        )


def show_header(header: Header) -> dict[str, Any]:
    return {
        "kind": header.kind.name,
        "chain": header.chain_id,
        "generation": header.generation.hex(),
        "epoch": header.epoch,
        "writer": header.writer.hex(),
        "seq": header.seq,
        "walk": header.walk,
        "height": header.ref.height,
        "block_hash": header.ref.block_hash[::-1].hex(),
        "parent_hash": header.parent_hash[::-1].hex(),
        "prev_root": header.prev_root.hex(),
        "post_root": header.post_root.hex(),
        "frame_id": header.frame_id.hex(),
        "prev_frame_id": header.prev_frame_id.hex(),
        "next_input_offset": header.next_input_offset,
        "block_time_s": header.block_time_s,
        "op_count": header.op_count,
        "codec": header.codec.name,
    }


def _show_range(one: RangeDiff) -> dict[str, Any]:
    meta = one.resume
    return {
        "chain": meta.chain_id,
        "generation": meta.generation.hex(),
        "shard": meta.shard,
        "first_height": one.name.first,
        "last_height": one.name.last,
        "block_hash": one.ref.block_hash[::-1].hex(),
        "parent_hash": one.parent[::-1].hex(),
        "prev_root": one.prev_root.hex(),
        "post_root": meta.tip.root.hex(),
        "next_seq": meta.seq + 1,
        "pieces": len(one.pieces),
        "op_count": one.changes,
    }


def _show_changes(tables: Iterable[TableDiff]) -> Iterator[dict[str, Any]]:
    for table in tables:
        for key, before, after in table.changes():
            yield {
                "table": table.schema.name,
                "key": describe_key(table.schema, key),
                "before": None if before is None else before.hex(),
                "after": None if after is None else after.hex(),
            }


@frames.command()
@_Files
@_Height
@_Json
def dump(files: tuple[Path, ...], height: int | None, as_json: bool) -> None:
    """Headers and changes, readable. With --json all of it is in memory; else a frame, or a chunk of a range diff."""
    found = map(_dumped, read_archived(files, height))
    if as_json:
        emit([{kind: shown, "changes": list(changes)} for kind, shown, changes in found], as_json=True)
        return
    for at, (_, shown, changes) in enumerate(found):
        click.echo(("\n" if at else "") + rows(shown))
        for change in changes:
            mark = "+" if change["before"] is None else "-" if change["after"] is None else "~"
            click.echo(f"  {mark} {change['table']} {change['key']}")


def _dumped(one: bytes | RangeDiff) -> tuple[str, dict[str, Any], Iterator[dict[str, Any]]]:
    if isinstance(one, RangeDiff):
        return "range_diff", _show_range(one), _show_changes(one.chunks())
    decoded, diff = _whole(one)
    return "header", show_header(decoded.header), _show_changes(diff.tables.values())


@frames.command()
@_Files
@_Json
def verify(files: tuple[Path, ...], as_json: bool) -> None:
    """Check every frame's content against its id, that of range diffs against the roots that they lead from and to,
    and that they follow each other."""
    last: _Link | None = None
    first: _Link | None = None
    counts = {"frames": 0, "range_diffs": 0}
    for one in read_archived(files):
        if isinstance(one, RangeDiff):
            check_range(one)
            link = _Link.of(one)
        else:
            decoded, diff = _whole(one)
            _check_id(decoded, diff)
            link = _Link.of(decoded.header)
        counts["range_diffs" if isinstance(one, RangeDiff) else "frames"] += 1
        if last is not None:
            _check_follows(last, link)
        first, last = first or link, link
    assert first is not None and last is not None, "read_archived found none and did not say so"
    document = {
        "verified": True,
        **counts,
        "first_height": first.first,
        "last_height": last.ref.height,
        "prev_root": first.prev_root.hex(),
        "post_root": last.post_root.hex(),
    }
    emit(document, as_json=as_json, text=lambda: rows(document))


@frames.command()
@_Files
@click.option("--height", type=int, help="The block's height, where the files hold more than one.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the inverted frame goes.")
@_Json
def invert(files: tuple[Path, ...], height: int | None, out: Path, as_json: bool) -> None:
    """The frame that takes a block back: what its UNDO does, in whole form."""
    found = list(read_frames(files, height))
    if len(found) != 1:
        raise UsageError(f"{len(found)} frames in these files", way_out="choose one with --height")
    decoded, diff = _whole(found[0])
    _check_id(decoded, diff)
    header = decoded.header
    kind = Kind.APPLY if header.kind is Kind.UNDO else Kind.UNDO
    _write(out, header, diff.inverted(), kind=kind, prev_root=header.post_root, post_root=header.prev_root)
    document = {"inverted": str(out), "height": header.ref.height, "op_count": diff.op_count, "kind": kind.name}
    emit(document, as_json=as_json, text=lambda: rows(document))


@frames.command("squash")
@_Files
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the squashed frame goes.")
@_Json
def squash_command(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Consecutive blocks as one netted frame, from before the first to after the last."""
    decoded = []
    diffs = []
    for data in read_frames(files):
        one, diff = _whole(data)
        _check_id(one, diff)
        decoded.append(one.header)
        diffs.append(diff)
    for before, after in itertools.pairwise(map(_Link.of, decoded)):
        _check_follows(before, after)
    netted = squash(diffs)
    first, last = decoded[0], decoded[-1]
    _write(
        out,
        replace(last, parent_hash=first.parent_hash, prev_frame_id=first.prev_frame_id),
        netted,
        kind=Kind.APPLY,
        prev_root=first.prev_root,
        post_root=last.post_root,
    )
    document = {
        "squashed": str(out),
        "frames": len(diffs),
        "from_height": first.ref.height,
        "to_height": last.ref.height,
        "op_count_before": sum(diff.op_count for diff in diffs),
        "op_count": netted.op_count,
        "tables": {SCHEMAS[table_id].name: len(table) for table_id, table in netted.tables.items()},
    }
    emit(document, as_json=as_json, text=lambda: rows(document))


def _write(out: Path, header: Header, diff: Diff, *, kind: Kind, prev_root: bytes, post_root: bytes) -> None:
    body = diff.encode()
    made = replace(header, kind=kind, prev_root=prev_root, post_root=post_root, op_count=diff.op_count)
    made = replace(made, frame_id=frame.frame_id(made, body.digests))
    out.write_bytes(frame.encode(made, join_tables(body.columns)))
