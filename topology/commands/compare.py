"""`stateferry compare`: where two nodes, snapshots or object stores part, and in which keys."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline.apply import describe_key
from pipeline.commitment import lthash
from pipeline.comparison import Difference, Heights, Point, differing_changes, first_difference
from pipeline.errors import Different, NotFound
from pipeline.objects import open_objects
from pipeline.shards import sum_vectors
from pipeline.state import schema_named
from topology import logs, settings
from topology.commands.common import emit, opened_views, rows
from topology.contents import differing_keys
from topology.data_dir import DataDir
from topology.sides import NodeSide, ObjectsSide, Side

_KEYS_MAX = 100
_AT_HEIGHT = re.compile(r"(.+)@(\d+)")


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--chain", metavar="NAME", default="", help="Of an object store that holds several.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=_KEYS_MAX, show_default=True, help="Keys to name.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def compare(a: str, b: str, chain: str, limit: int, as_json: bool) -> None:
    """Whether A and B hold the same; the first height at which they do not, and the keys.

    Each is a data directory (its worker may run), an object store by its URL, or a snapshot in one: URL@HEIGHT. Exit
    code 0: what both have is equal; 17: it differs.
    """
    logs.configure(verbose=False)
    with ExitStack() as stack:
        one = _open(stack, a, chain, None)
        two = _open(stack, b, chain, one.generation)
        if one.generation != two.generation and isinstance(one, ObjectsSide):
            one = _open(stack, a, chain, two.generation)
        document = _compare(one, two, limit)
        document["read"] = {"a": dict(one.read), "b": dict(two.read)}
    differs = not document["equal"]
    if differs:
        height = document["first_height"]
        error = Different(
            f"they differ {'from' if document['is_first'] else 'at'} height {height}"
            + ("" if document["is_first"] else ", and may do so below it"),
            where=f"{a}, {b}",
            way_out="`stateferry verify --level full` says of each whether it holds what it says",
        )
        document |= error.document
    emit(document, as_json=as_json, text=lambda: _text(document))
    if differs:
        click.echo(f"{error.name}: {error}", err=True)
        raise click.exceptions.Exit(error.exit_code)


def _open(stack: ExitStack, text: str, chain: str, wanted: bytes | None) -> Side:
    at_height = _AT_HEIGHT.fullmatch(text)
    url, height = (at_height[1], int(at_height[2])) if at_height else (text, None)
    if "://" in url:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stateferry-")))
        side = ObjectsSide(text, open_objects(url), scratch, chain_id=chain or None, wanted=wanted, height=height)
        stack.callback(side.close)
        return side
    if not DataDir(Path(text)).has_store:
        raise NotFound(
            "there is no store in this data directory", where=text, way_out="an object store is named by its URL"
        )
    return NodeSide(text, stack.enter_context(opened_views(settings.load(data_dir=Path(text), chain=chain or None))))


def _compare(a: Side, b: Side, limit: int) -> dict[str, Any]:
    history = (_histories if a.shards == b.shards else _whole_histories)(a, b, limit)
    if history is not None and history.get("is_first"):
        return history
    found = [one for one in (_states(a, b, limit), history) if one is not None]
    differing = next((one for one in found if not one["equal"]), None)  # states name the keys
    equal = max(found, key=lambda one: one.get("height", -1), default=None)
    return differing or equal or _roots(a, b) or _nothing(a, b)


def _histories(a: Side, b: Side, limit: int) -> dict[str, Any] | None:
    """Shard by shard, by points and changes; None if there is no height of which both have them."""
    both = [a.heights(shard).common(b.heights(shard)) for shard in range(a.shards)]
    if not all(map(len, both)):
        return None
    parted = [first_difference(heights, partial(_is_alike, a, b, shard)) for shard, heights in enumerate(both)]
    first = min((one[0] for one in parted if one is not None), default=None)
    if first is None:
        return {"equal": True, "height": min(heights[len(heights) - 1] for heights in both), "by": "history"}
    shards = [shard for shard, one in enumerate(parted) if one is not None and one[0] == first]
    is_first = all(parted[shard] == (first, first - 1) for shard in shards)
    points = {name: _point(side.point(shards[0], first)) for name, side in (("a", a), ("b", b))}
    document = {"equal": False, "first_height": first, "is_first": is_first, "by": "history", "shards": shards}
    return document | points | _changed_keys(a, b, first if is_first else None, shards, shards, limit)


def _is_alike(a: Side, b: Side, shard: int, height: int) -> bool:
    return a.point(shard, height).is_like(b.point(shard, height))


def _whole_histories(a: Side, b: Side, limit: int) -> dict[str, Any] | None:
    """The same between sides with other numbers of shards, by global roots: first where they cost no frames, then
    between two such heights."""
    both = Heights.common_to(side.heights(shard) for side in (a, b) for shard in range(side.shards))
    if not len(both):
        return None
    last = both[len(both) - 1]
    marks = set.intersection(*(side.marks(shard) for side in (a, b) for shard in range(side.shards)))
    is_alike = cache(partial(_is_alike_whole, a, b))
    parted = first_difference(both.only(marks | {last}), is_alike)
    if parted is None:
        return {"equal": True, "height": last, "by": "history"}
    stop, below = parted
    start = both[0] if below is None else below + 1
    between = first_difference(both.common(Heights([range(start, stop + 1)])), is_alike)
    assert between is not None, (start, stop)
    first, before = between[0], below if between[1] is None else between[1]
    is_first = before == first - 1
    points = {name: _point(_whole_point(side, first)) for name, side in (("a", a), ("b", b))}
    document = {"equal": False, "first_height": first, "is_first": is_first, "by": "history"}
    return document | points | _changed_keys(a, b, first if is_first else None, range(a.shards), range(b.shards), limit)


def _whole_point(side: Side, height: int) -> Point:
    """With the global root."""
    point = side.point(0, height)
    if side.shards == 1:
        return point
    vectors = sum_vectors(side.vectors(shard, height) for shard in range(side.shards))
    return Point(point.ref, lthash.state_root(vectors), point.generation, b"")


def _is_alike_whole(a: Side, b: Side, height: int) -> bool:
    if a.point(0, height).ref != b.point(0, height).ref:
        return False  # and no vectors are needed
    return _whole_point(a, height).is_like(_whole_point(b, height))


def _changed_keys(
    a: Side, b: Side, height: int | None, shards_a: Sequence[int], shards_b: Sequence[int], limit: int
) -> dict[str, Any]:
    """What the blocks of a height left different, of these shards; None: what was different before is not known."""
    if height is None:
        return _keys(iter(()), limit)
    one, two = [a.diff(shard, height) for shard in shards_a], [b.diff(shard, height) for shard in shards_b]
    return _keys(differing_changes(one, two), limit)


def _states(a: Side, b: Side, limit: int) -> dict[str, Any] | None:
    """By whole contents, at the heights of which both have one; None if there is none, or histories say more."""
    roots = a.roots(), b.roots()
    heights = sorted(roots[0].keys() & roots[1].keys())
    for height in heights:
        if roots[0][height] != roots[1][height]:
            one, two = a.state(height), b.state(height)
            document = {"equal": False, "first_height": height, "is_first": False, "by": "state"}
            document |= {"a": {"root": one.root.hex()}, "b": {"root": two.root.hex()}}
            return document | _keys(differing_keys(one, two), limit)
    if not heights:
        return None
    return {"equal": True, "height": heights[-1], "by": "state"}


def _roots(a: Side, b: Side) -> dict[str, Any] | None:
    """Where one has a history and the other a state, by the global root alone; None without such a height."""
    pairs = []
    for name, one, other in (("a", a, b), ("b", b, a)):
        heights = Heights.common_to(one.heights(shard) for shard in range(one.shards))
        pairs += [(height, root, name) for height, root in other.roots().items() if height in heights]
    for height, root, name in sorted(pairs):
        point = _whole_point(a if name == "a" else b, height)
        if point.root[: len(root)] != root:
            document = {"equal": False, "first_height": height, "is_first": False, "by": "root"}
            return document | {name: _point(point), "b" if name == "a" else "a": {"root": root.hex()}}
    return {"equal": True, "height": max(pairs)[0], "by": "root"} if pairs else None


def _nothing(a: Side, b: Side) -> NoReturn:
    raise NotFound(
        "there is no height at which both can be compared", where=f"{a.name}: {_reach(a)}; {b.name}: {_reach(b)}"
    )


def _reach(side: Side) -> str:
    runs = [f"{run.start} to {run.stop - 1}" for run in side.heights(0).runs]
    return ", ".join(
        [*(f"blocks {run}" for run in runs), *(f"the state at {height}" for height in sorted(side.roots()))]
    )


def _point(point: Point) -> dict[str, Any]:
    found = {"block_hash": point.ref.block_hash[::-1].hex(), "root": point.root.hex()}
    return found | ({"frame_id": point.frame_id.hex()} if point.frame_id else {})


def _keys(found: Iterator[Difference], limit: int) -> dict[str, Any]:
    page = list(itertools.islice(found, limit + 1))
    return {
        "keys": [
            {
                "table": one.table,
                "key": describe_key(schema_named(one.table), one.key),
                "a": None if one.a is None else one.a.hex(),
                "b": None if one.b is None else one.b.hex(),
            }
            for one in page[:limit]
        ],
        "more_keys": len(page) > limit,
    }


def _text(document: dict[str, Any]) -> str:
    flat = {
        name: value for name, value in document.items() if name in ("equal", "height", "first_height", "by", "read")
    }
    for side in ("a", "b"):
        flat |= {f"{side} {name}": value for name, value in document.get(side, {}).items()}
    lines = [rows(flat)]
    for one in document.get("keys", ()):
        lines += [f"{one['table']} {one['key']}", f"  a  {one['a'] or 'none'}", f"  b  {one['b'] or 'none'}"]
    return "\n".join(lines)
