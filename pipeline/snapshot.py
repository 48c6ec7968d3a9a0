"""Snapshots: one position's whole state, as parts and the manifest that makes them exist.

Partials of the parts sum up to the vectors of the position, so a manifest can be checked without reading a part.
Nothing exists until the **manifest** does: parts are put first, the manifest last, created if absent. A crash in
between leaves parts that nobody names.

    CHAIN/GENERATION/snapshots/HEIGHT-ROOT/manifest.json              height with 12 digits, first 16 hex of the root
    CHAIN/GENERATION/snapshots/HEIGHT-ROOT/part-NNNNN-DIGEST.sst      number, first 16 hex of the digest

With several shards there is one manifest all the same: their parts follow each other, as their keys do, and it names
for each shard where it goes on from. All stand at one seq, so their vectors add up to those of the whole state.

A manifest is a canonical document (`pipeline.canonical`), bytes in lower-case hex, no other number than integers. Its
fields:

    bytes               all parts' bytes
    chain, generation, generation_number, shards, finality
    counts              keys by table name
    digest              as of every canonical document
    format              1; 2 with several shards
    height, hash, root, walk     the position; hash is in hashing order
    keys                all parts' keys
    minimum_reader      the lowest format version that a reader must know
    parts               in ascending order of keys; none has keys of two shards:
        name, bytes, digest (BLAKE3-256), keys, first_key, last_key (storage keys), first_group, last_group,
        partials        vectors by table name; a table without keys in the part is left out
    resume              the `Meta` from which to go on, encoded as stores encode it: seq, frame id, epochs, and of both
                        topics the next offset with the digest of the record before it. With several shards it is
                        `resumes`, one for each in their order
    signature, signer   optional, beside the digest (`pipeline.signature`): of it, and the public key
    vectors             by table name
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline.archive import resume_record
from pipeline.canonical import digest_of, sealed, unsealed
from pipeline.diff import Vectors
from pipeline.errors import AuditFailed, ManifestCorrupt, StoreCorrupt, Unsupported, UsageError
from pipeline.generation import Generation
from pipeline.parts import Part, sum_parts
from pipeline.position import Meta, Tip, decode_meta, encode_meta
from pipeline.shards import check_shards, groups_of, join_tips, shard_of, stand_together
from pipeline.signature import SIGNATURE_BYTES, Signature, SigningKey
from pipeline.state import SCHEMAS, SCHEMAS_BY_NAME, schema_of_storage_key
from pipeline.verify import check_audit

FORMAT_VERSION = 2
"""The newest that this build reads. It writes the lowest one that says what there is to say."""
MANIFEST_FILE = "manifest.json"
_BESIDE = ("signature", "signer")

_NAME = re.compile(r"(.+)/([0-9a-f]{32})/snapshots/(\d{12,})-([0-9a-f]{16})/manifest\.json")
_PART_NAME = re.compile(r"part-\d{5,}-([0-9a-f]{16})\.sst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A snapshot. ``resumes`` hold the position, the vectors and the links of each shard; the rest is for readers.

    * The shards stand at one block and one seq. `tip` is that of all of them.
    """

    resumes: tuple[Meta, ...]
    parts: tuple[Part, ...]
    signature: Signature | None = None

    @property
    def chain_id(self) -> str:
        return self.resumes[0].chain_id

    @property
    def generation(self) -> bytes:
        return self.resumes[0].generation

    @property
    def generation_number(self) -> int:
        return self.resumes[0].generation_number

    @property
    def finality(self) -> int:
        return self.resumes[0].finality

    @property
    def shards(self) -> int:
        return len(self.resumes)

    @property
    def tip(self) -> Tip:
        return join_tips([resume.tip for resume in self.resumes])

    @property
    def height(self) -> int:
        return self.resumes[0].tip.height

    @property
    def root(self) -> bytes:
        return self.tip.root

    def parts_of(self, shard: int) -> list[Part]:
        return parts_of(self.parts, shard, self.shards)

    @property
    def keys(self) -> int:
        return sum(part.keys for part in self.parts)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def digest(self) -> bytes:
        """The same, signed or not."""
        return digest_of(_fields(self))

    @property
    def folder(self) -> str:
        return snapshot_folder(self.chain_id, self.generation, self.height, self.root)

    @property
    def name(self) -> str:
        return f"{self.folder}/{MANIFEST_FILE}"

    def part_name(self, part: Part) -> str:
        """The name of a part's object."""
        return f"{self.folder}/{part.name}"


class ManifestName(NamedTuple):
    """What a manifest's name says; ``root_start``: the first 8 bytes of the root."""

    chain_id: str
    generation: bytes
    height: int
    root_start: bytes

    @property
    def folder(self) -> str:
        return snapshot_folder(*self)

    def __str__(self) -> str:
        return f"{self.folder}/{MANIFEST_FILE}"


def snapshot_folder(chain_id: str, generation: bytes, height: int, root: bytes) -> str:
    return f"{chain_id}/{generation.hex()}/snapshots/{height:012d}-{root[:8].hex()}"


def parse_manifest_name(name: str) -> ManifestName | None:
    """The inverse of `Manifest.name`; None for an object that is no manifest."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    chain_id, generation, height, root = match.groups()
    parsed = ManifestName(chain_id, bytes.fromhex(generation), int(height), bytes.fromhex(root))
    return parsed if str(parsed) == name else None


def parts_of(parts: Iterable[Part], shard: int, shards: int) -> list[Part]:
    """The parts whose first key is a shard's."""
    return [part for part in parts if part.first_group in groups_of(shard, shards)]


def base_resume(generation: Generation, shard: int, vectors: Vectors, counts: Mapping[int, int], finality: int) -> Meta:
    """The meta of a shard's base state at `Generation.base`: nothing of either topic was read."""
    assert generation.base is not None
    height = generation.base.height
    return Meta(
        chain_id=generation.chain_id,
        generation=generation.generation,
        generation_number=generation.number,
        finality=finality,
        shard=shard,
        shards=generation.shards,
        tip=Tip(ref=generation.base, vectors=vectors, seq=0, counts=counts),
        base_height=height,
        highest=height,
    )


def make_manifest(parts: Sequence[Part], resumes: Sequence[Meta], key: SigningKey | None = None) -> Manifest:
    """The manifest of parts that were just written; ``key``: to sign it with. Raises AuditFailed unless those of each
    shard sum up to its position."""
    for resume in resumes:
        check_audit(sum_parts(parts_of(parts, resume.shard, resume.shards)), resume.tip)
    return signed(Manifest(resumes=tuple(map(resume_record, resumes)), parts=tuple(parts)), key)


def signed(manifest: Manifest, key: SigningKey | None) -> Manifest:
    """The manifest with a signature of its own; None: without any."""
    return replace(manifest, signature=None if key is None else key.sign(manifest.digest))


# Manifests


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON, its digest inside."""
    signature = manifest.signature
    beside = {"signature": signature.value.hex(), "signer": signature.signer.hex()} if signature else {}
    return sealed(_fields(manifest), beside)


def decode_manifest(data: bytes) -> Manifest:
    """The inverse of `encode_manifest`; a signature is read and not checked. Raises ManifestCorrupt (any other byte,
    parts out of order, partials that do not sum up) and Unsupported."""
    try:
        fields = unsealed(data, _BESIDE)
    except ValueError as error:
        raise ManifestCorrupt(f"a manifest cannot be read: {error}") from error
    minimum = fields.get("minimum_reader")
    if isinstance(minimum, int) and minimum > FORMAT_VERSION:
        raise Unsupported(
            f"a manifest for readers of format {minimum} or later",
            way_out=f"this build reads {FORMAT_VERSION}: upgrade",
        )
    try:
        resumes = [fields["resume"]] if fields["shards"] == 1 else fields["resumes"]
        manifest = Manifest(
            resumes=tuple(decode_meta(bytes.fromhex(resume)) for resume in resumes),
            parts=tuple(map(_part, fields["parts"])),
            signature=_signature(fields),
        )
        _check_resumes(manifest.resumes)
        same = _fields(manifest) == fields
    except (KeyError, TypeError, ValueError, AttributeError, StoreCorrupt, UsageError) as error:
        raise ManifestCorrupt(f"a manifest is malformed: {error!r}") from error
    if not same:
        raise ManifestCorrupt("the fields of a manifest do not agree with each other")
    _check(manifest)
    return manifest


def _signature(fields: dict[str, Any]) -> Signature | None:
    """Takes the fields beside the digest out."""
    value, signer = (fields.pop(name, None) for name in _BESIDE)
    if value is None and signer is None:
        return None
    found = Signature(bytes.fromhex(signer), bytes.fromhex(value))
    if (found.signer.hex(), found.value.hex()) != (signer, value) or len(found.value) != SIGNATURE_BYTES:
        raise ValueError("a signature that cannot be one")
    return found


def _fields(manifest: Manifest) -> dict[str, Any]:
    resume, tip = manifest.resumes[0], manifest.tip
    version = 1 if manifest.shards == 1 else 2
    resumes = [encode_meta(one).hex() for one in manifest.resumes]
    return ({"resume": resumes[0]} if version == 1 else {"resumes": resumes}) | {
        "bytes": manifest.size_bytes,
        "chain": resume.chain_id,
        "counts": {SCHEMAS[table_id].name: count for table_id, count in tip.counts.items()},
        "finality": resume.finality,
        "format": version,
        "generation": resume.generation.hex(),
        "generation_number": resume.generation_number,
        "hash": tip.block_hash.hex(),
        "height": tip.height,
        "keys": manifest.keys,
        "minimum_reader": version,
        "parts": [
            {
                "bytes": part.size_bytes,
                "digest": part.digest.hex(),
                "first_group": part.first_group,
                "first_key": part.first_key.hex(),
                "keys": part.keys,
                "last_group": part.last_group,
                "last_key": part.last_key.hex(),
                "name": part.name,
                "partials": _by_name(part.partials),
            }
            for part in manifest.parts
        ],
        "root": tip.root.hex(),
        "shards": manifest.shards,
        "vectors": _by_name(tip.vectors),
        "walk": resume.walk,
    }


def _by_name(vectors: Mapping[int, bytes]) -> dict[str, str]:
    return {SCHEMAS[table_id].name: vector.hex() for table_id, vector in vectors.items()}


def _part(fields: Any) -> Part:
    part = Part(
        name=fields["name"],
        size_bytes=fields["bytes"],
        digest=bytes.fromhex(fields["digest"]),
        keys=fields["keys"],
        first_key=bytes.fromhex(fields["first_key"]),
        last_key=bytes.fromhex(fields["last_key"]),
        partials={SCHEMAS_BY_NAME[name].table_id: bytes.fromhex(vector) for name, vector in fields["partials"].items()},
    )
    if any(not isinstance(number, int) or number <= 0 for number in (part.size_bytes, part.keys)):
        raise ValueError(f"part {part.name} has {part.size_bytes} bytes, {part.keys} keys")
    match = _PART_NAME.fullmatch(part.name)
    if len(part.digest) != 32 or match is None or match.group(1) != part.digest[:8].hex():
        raise ValueError(f"part {part.name} is not named by its digest")
    return part


def _check_resumes(resumes: Sequence[Meta]) -> None:
    """Raises ValueError unless there is one for each shard, all of one history and at one position."""
    check_shards(len(resumes))
    for shard, resume in enumerate(resumes):
        if (resume.shard, resume.shards) != (shard, len(resumes)):
            raise ValueError(f"resume record {shard} of {len(resumes)} is of shard {resume.shard} of {resume.shards}")
    histories = {(one.chain_id, one.generation, one.generation_number, one.finality) for one in resumes}
    if len(histories) > 1 or not stand_together(resumes):
        raise ValueError("the shards are not of one history, or do not stand at one block")


def _check(manifest: Manifest) -> None:
    """What holds between the parts and the position. Raises ManifestCorrupt."""
    last = b""
    try:
        for part in manifest.parts:
            for key in (part.first_key, part.last_key):
                schema_of_storage_key(key)
            if not last < part.first_key <= part.last_key:
                raise ManifestCorrupt(f"part {part.name} is out of order, or overlaps the one before")
            if shard_of(part.first_key, manifest.shards) != shard_of(part.last_key, manifest.shards):
                raise ManifestCorrupt(f"part {part.name} has keys of several shards")
            last = part.last_key
        for resume in manifest.resumes:
            found = sum_parts(manifest.parts_of(resume.shard))
            check_audit(found, resume.tip)
            if found.keys != sum(resume.tip.counts.values()):
                raise ManifestCorrupt(f"the parts of a manifest have {found.keys} keys, its position another number")
    except (StoreCorrupt, AuditFailed, ValueError, KeyError) as error:
        raise ManifestCorrupt(f"the parts of a manifest do not make its state: {error}") from error
