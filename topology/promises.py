"""What an object store promises to restore, and whether it can."""

from __future__ import annotations

from pipeline import frame
from pipeline.archive_names import parse_piece_name, parse_segment_name, whole_ranges
from pipeline.frame import NO_HASH
from pipeline.objects import ObjectStore
from pipeline.plans import SegmentObject
from pipeline.restorable import Restorable, restorable
from pipeline.retention import Rules
from pipeline.routes import History
from topology.collector import look
from topology.fetching import open_segment


def promises(objects: ObjectStore, chain_id: str, rules: Rules) -> list[Restorable]:
    """Of each generation, in their order. Reads names, manifests, and the first segment of each generation.
    SegmentCorrupt, LeaseCorrupt, Unsupported."""
    seen = look(objects, chain_id, rules)
    listed = [(parse_segment_name(info.name), info.size_bytes) for info in seen.infos]
    segments = [SegmentObject(name, size) for name, size in listed if name is not None]
    pieces = [(parse_piece_name(info.name), info.size_bytes) for info in seen.infos]
    ranges = whole_ranges((piece, size) for piece, size in pieces if piece is not None)
    histories = {
        manifest.generation: History(manifest.generation_number, manifest.shards)
        for manifest in (verdict.snapshot.manifest for verdict in seen.verdicts)
        if manifest is not None
    }
    begins: dict[bytes, bool] = {}
    for _, name in sorted((one.name.first, one.name) for one in segments):
        if name.generation not in begins:
            segment = open_segment(objects.get(str(name)), name)
            begins[name.generation] = frame.peek(segment.frame_at(name.first)).parent_hash == NO_HASH
            histories.setdefault(name.generation, History(segment.resume.generation_number, segment.resume.shards))
    return [
        restorable(
            generation,
            seen.verdicts,
            [one for one in segments if one.name.generation == generation],
            [one for one in ranges if one.name.generation == generation],
            history,
            everything=not rules.are_set,
            from_empty=begins.get(generation, False),
            has_expired=generation in seen.expired,
        )
        for generation, history in sorted(histories.items(), key=lambda item: item[1].number)
    ]
