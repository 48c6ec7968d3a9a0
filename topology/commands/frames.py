"""`stateferry frame`: archived frames and segments as files, no broker and no store needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline import frame
from pipeline.apply import describe_key
from pipeline.archive import MAGIC as SEGMENT_MAGIC
from pipeline.archive import Segment
from pipeline.diff import Diff, decode_whole_body, join_tables, squash
from pipeline.errors import CorruptInput, FrameCorrupt, FrameIdMismatch, UsageError
from pipeline.frame import Feature, Frame, Header, Kind
from pipeline.state import SCHEMAS
from topology import logs
from topology.commands.common import emit, rows

_Files = click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
_Json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_Height = click.option("--height", type=int, help="Only the block at this height.")


@click.group("frame")
def frames() -> None:
    """Archived frames: FILES are segments (.seg) or single frames."""
    logs.configure(verbose=False)


def read_frames(files: tuple[Path, ...], height: int | None = None) -> Iterator[bytes]:
    """The frames in some files, in order. Raises SegmentCorrupt, FrameCorrupt, UsageError (no such height)."""
    found = False
    for file in files:
        data = file.read_bytes()
        try:
            for one in Segment.open(data).frames() if data[:4] == SEGMENT_MAGIC else [data]:
                if height is None or frame.peek(one).ref.height == height:
                    found = True
                    yield one
        except CorruptInput as error:
            error.where = error.where or str(file)
            raise
    if not found:
        raise UsageError(f"no frame of height {height} in these files")


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


def _show_changes(diff: Diff) -> list[dict[str, Any]]:
    return [
        {
            "table": table.schema.name,
            "key": describe_key(table.schema, key),
            "before": None if before is None else before.hex(),
            "after": None if after is None else after.hex(),
        }
        for table in diff.tables.values()
        for key, before, after in table.changes()
    ]


@frames.command()
@_Files
@_Height
@_Json
def dump(files: tuple[Path, ...], height: int | None, as_json: bool) -> None:
    """Headers and changes, readable."""
    document = []
    for data in read_frames(files, height):
        decoded, diff = _whole(data)
        document.append({"header": show_header(decoded.header), "changes": _show_changes(diff)})
    emit(document, as_json=as_json, text=lambda: "\n\n".join(map(_dump_text, document)))


def _dump_text(one: dict[str, Any]) -> str:
    lines = [rows(one["header"])]
    for change in one["changes"]:
        mark = "+" if change["before"] is None else "-" if change["after"] is None else "~"
        lines.append(f"  {mark} {change['table']} {change['key']}")
    return "\n".join(lines)


@frames.command()
@_Files
@_Json
def verify(files: tuple[Path, ...], as_json: bool) -> None:
    """Check every frame's content against its id, and that the frames follow each other."""
    last: Header | None = None
    first: Header | None = None
    count = 0
    for data in read_frames(files):
        decoded, diff = _whole(data)
        header = decoded.header
        _check_id(decoded, diff)
        if last is not None and (header.parent_hash, header.prev_root) != (last.ref.block_hash, last.post_root):
            raise FrameCorrupt(f"block {header.ref} does not follow block {last.ref}")
        first, last, count = first or header, header, count + 1
    assert first is not None and last is not None, "read_frames found none and did not say so"
    document = {
        "verified": True,
        "frames": count,
        "first_height": first.ref.height,
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
    for before, after in itertools.pairwise(decoded):
        if (after.parent_hash, after.prev_root) != (before.ref.block_hash, before.post_root):
            raise FrameCorrupt(f"block {after.ref} does not follow block {before.ref}")
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
