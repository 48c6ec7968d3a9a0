import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from pipeline.commitment import lthash
from pipeline.errors import AuditFailed, CoinsCorrupt, ManifestCorrupt, Unsupported, UsageError
from pipeline.generation import Generation, Opening
from pipeline.objects import LocalObjects, MemoryObjects
from pipeline.parts import digest_file, sum_parts, write_parts
from pipeline.snapshot import (
    Manifest,
    decode_manifest,
    encode_manifest,
    make_manifest,
    parse_manifest_name,
)
from pipeline.state import UTXO
from pipeline.stores.base import Batch
from pipeline.stores.rocksdb import RocksStore
from pipeline.verify import audit
from tests.ferries import SMALL_PART_BYTES, Ferry, Killed, kill_at, make_ferry
from tests.walks import coin, ref
from topology.base_state import publish_base
from topology.restore_plans import Request
from topology.restorer import restore
from topology.snapshotter import snapshot_in_process, take_snapshot

__all__ = ["kill_at"]


@pytest.fixture(scope="module")
def ferry(tmp_path_factory: pytest.TempPathFactory) -> Ferry:
    return make_ferry(tmp_path_factory.mktemp("ferry"))


def test_a_snapshot_is_the_final_state(ferry: Ferry) -> None:
    """Parts hold the state at the final height, sum up to its root, and stand at the block of the final branch."""
    for manifest in ferry.manifests:
        header = ferry.headers[manifest.height]

        assert (manifest.tip.ref, manifest.root) == (header.ref, header.post_root)
        assert len(manifest.parts) > 1
        assert sum_parts(manifest.parts).vectors == dict(manifest.tip.vectors)
        assert manifest.keys == len(ferry.content_at(manifest.height))
        for part in manifest.parts:
            path = ferry.objects_path / manifest.part_name(part)
            assert (path.stat().st_size, digest_file(path)) == (part.size_bytes, part.digest)


def test_manifest_round_trip(ferry: Ferry) -> None:
    """A manifest is what its bytes say, and its name says which it is."""
    for manifest in ferry.manifests:
        data = encode_manifest(manifest)

        assert decode_manifest(data) == manifest
        assert encode_manifest(decode_manifest(data)) == data == ferry.objects.get(manifest.name)
        name = parse_manifest_name(manifest.name)
        assert name is not None
        assert (name.height, name.root_start) == (manifest.height, manifest.root[:8])
        assert parse_manifest_name(manifest.name + "x") is None


def test_every_flipped_bit_of_a_manifest_is_found(ferry: Ferry) -> None:
    """No bit can change, no byte can be cut off or added."""
    data = encode_manifest(ferry.manifests[0])
    for at in range(0, len(data), max(1, len(data) // 1500)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ManifestCorrupt):
            decode_manifest(bytes(flipped))
    for strange in (b"", b"{}", b"[]", b"null", data[:-1], data + b"\n", data.replace(b",", b", ", 1), b"[" * 100_000):
        with pytest.raises(ManifestCorrupt):
            decode_manifest(strange)


def signed(fields: dict[str, object]) -> bytes:
    """A manifest with any fields, its digest right."""

    def canonical(fields: dict[str, object]) -> bytes:
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    fields = {name: value for name, value in fields.items() if name != "digest"}
    return canonical(fields | {"digest": blake3(canonical(fields)).hexdigest()})


def test_manifests_that_lie(ferry: Ferry) -> None:
    """A manifest with a right digest must still agree with itself."""
    manifest = ferry.manifests[0]
    fields = json.loads(encode_manifest(manifest))
    parts = manifest.parts
    table_id = next(iter(parts[0].partials))
    partial = bytearray(parts[0].partials[table_id])
    partial[0] ^= 1
    lies = [
        replace(manifest, parts=(replace(parts[0], partials={table_id: bytes(partial)}), *parts[1:])),
        replace(manifest, parts=parts[1:]),
        replace(manifest, parts=(parts[1], parts[0], *parts[2:])),
        replace(manifest, parts=(parts[0], *parts)),
        replace(manifest, parts=(replace(parts[0], keys=parts[0].keys + 1), *parts[1:])),
        replace(manifest, parts=(replace(parts[0], name="../../etc.sst"), *parts[1:])),
        replace(manifest, parts=(replace(parts[0], last_key=parts[1].last_key), *parts[1:])),
    ]
    for lie in lies:
        with pytest.raises(ManifestCorrupt):
            decode_manifest(encode_manifest(lie))
    assert decode_manifest(signed(fields)) == manifest
    for name, value in (("height", 0), ("root", "00" * 32), ("parts", 7), ("resume", "zz"), ("more", 1), ("keys", 1.5)):
        with pytest.raises(ManifestCorrupt):
            decode_manifest(signed(fields | {name: value}))
    with pytest.raises(Unsupported):
        decode_manifest(signed(fields | {"minimum_reader": 3, "unheard_of": True}))


def test_manifests_of_shards_that_lie() -> None:
    """Every shard's parts make its own state, and all shards stand at one position of one history."""
    manifest = decode_manifest((Path(__file__).parent / "golden/v1/manifest_of_shards.bin").read_bytes())
    one, other, last = manifest.parts
    (first, second) = manifest.resumes
    lies = [
        replace(manifest, parts=(one, replace(other, partials=last.partials), replace(last, partials=other.partials))),
        replace(manifest, parts=(one, replace(other, last_key=last.last_key))),
        replace(manifest, parts=(one, replace(other, keys=2))),
        replace(manifest, resumes=(second, first)),
        replace(manifest, resumes=(first,)),
        replace(manifest, resumes=(first, second, first)),
        replace(manifest, resumes=(first, replace(second, seq=second.seq + 1))),
        replace(manifest, resumes=(first, replace(second, generation=b"o" * 16))),
        replace(manifest, resumes=(first, replace(second, finality=7))),
    ]
    for lie in lies:
        with pytest.raises(ManifestCorrupt):
            decode_manifest(encode_manifest(lie))
    fields = json.loads(encode_manifest(manifest))
    assert decode_manifest(signed(fields)) == manifest
    for name, value in (("resumes", []), ("resumes", 7), ("shards", 1), ("shards", 4), ("resume", ""), ("format", 1)):
        with pytest.raises(ManifestCorrupt):
            decode_manifest(signed(fields | {name: value}))


def test_the_same_state_again(ferry: Ferry) -> None:
    """If neither height nor root moved, the snapshot that exists is returned, and nothing is put."""
    first = ferry.snapshot()
    before = list(ferry.objects.list())

    assert ferry.snapshot() == first
    assert list(ferry.objects.list()) == before
    assert first.height == ferry.node.meta.final_height


def test_nothing_is_final(tmp_path: Path, ferry: Ferry) -> None:
    """Heights that are not final, or that the journal no longer reaches, cannot be snapshotted."""
    with pytest.raises(UsageError, match="final"):
        ferry.snapshot(ferry.node.meta.final_height + 1)
    with pytest.raises(UsageError, match="final"):
        ferry.snapshot(0)
    young = make_ferry(tmp_path, events=3, snapshots=0)
    with pytest.raises(UsageError, match="no block is final yet"):
        young.snapshot()


def test_a_damaged_store_publishes_nothing(tmp_path: Path) -> None:
    """A snapshot audits its store: a value that is not what it should be is found before anything is put."""
    ferry = make_ferry(tmp_path, events=60, snapshots=0)
    key, stored = next(iter(ferry.store.scan()))
    ferry.store.write(Batch(state={key: stored[:-1] + bytes([stored[-1] ^ 1])}))
    before = list(ferry.objects.list())

    with pytest.raises((AuditFailed, Exception)) as caught:
        ferry.snapshot()
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    assert list(ferry.objects.list()) == before
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("place", "visible"),
    [
        ("snapshot.rolled_back", False),
        ("snapshot.part_put", False),
        ("snapshot.before_manifest", False),
        ("snapshot.after_manifest", True),
    ],
)
def test_crash(tmp_path: Path, place: str, visible: bool, kill_at: Callable[[str, int], None]) -> None:
    """A crash leaves nothing visible unless it came after the manifest; the next attempt ends with the same."""
    ferry = make_ferry(tmp_path, events=60, snapshots=0)

    def manifests() -> list[str]:
        return [info.name for info in ferry.objects.list() if parse_manifest_name(info.name)]

    kill_at(place, 1)
    with pytest.raises(Killed):
        ferry.snapshot()
    assert bool(manifests()) is visible
    (tmp_path / "scratch").mkdir(exist_ok=True)
    (tmp_path / "scratch" / "left-over").touch()
    manifest = ferry.snapshot()
    assert manifests() == [manifest.name]
    restored = restore(ferry.objects, tmp_path / "restored", Request(height=manifest.height), claimed=True)
    assert restored.meta.tip == manifest.tip


async def test_in_process(tmp_path: Path, ferry: Ferry) -> None:
    """The helper process publishes, and reports how far it is; errors come back as what they are."""
    reports: list[tuple[str, int, int]] = []
    url = f"file://{tmp_path}/objects"
    manifest = await snapshot_in_process([ferry.store], tmp_path, url, report=lambda *report: reports.append(report))

    assert manifest.height == ferry.node.meta.final_height
    assert {what for what, _, _ in reports} == {"frames taken back", "keys written", "bytes put"}
    with pytest.raises(UsageError, match="final"):
        await snapshot_in_process([ferry.store], tmp_path, url, height=10_000)
    assert names_in(tmp_path) == ["objects"]


async def test_two_at_once(tmp_path: Path, ferry: Ferry) -> None:
    """They take turns; the second finds what the first published."""
    url = f"file://{tmp_path}/objects"
    one, other = await asyncio.gather(*(snapshot_in_process([ferry.store], tmp_path, url) for _ in range(2)))

    assert one == other
    assert names_in(tmp_path) == ["objects"]


async def test_cancelled(tmp_path: Path, ferry: Ferry) -> None:
    """Cancelled, it leaves nothing behind."""
    task = asyncio.create_task(snapshot_in_process([ferry.store], tmp_path, f"file://{tmp_path}/objects"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(names_in(tmp_path)) <= {"objects"}
    assert not list(LocalObjects(tmp_path / "objects").list("walk"))


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


BASE = Generation(generation=b"b" * 16, chain_id="base", base=ref(99))


def base(tmp_path: Path, coins: list[tuple[bytes, bytes]]) -> tuple[MemoryObjects, Manifest]:
    objects = MemoryObjects()
    manifest = publish_base(objects, tmp_path / "importing", BASE, 6, iter(coins), part_raw_bytes_max=SMALL_PART_BYTES)
    assert not (tmp_path / "importing").exists()
    return objects, manifest


def test_base_state(tmp_path: Path) -> None:
    """Coins in any order, buckets among them, become a state from which a chain begins."""
    coins = [
        (coin(number, index, rest), b"v%d" % number) for number in range(40) for index in (0, 2) for rest in (0, 1)
    ]
    objects, manifest = base(tmp_path, coins[::-1])
    restored = restore(objects, tmp_path / "restored", Request())
    opening = Opening(
        generation=replace(BASE, base_vectors=manifest.tip.vectors, base_counts=manifest.tip.counts), finality=6
    )

    assert manifest.height == 99
    assert manifest.tip.counts == {1: len(coins)}
    assert restored.proof.proven
    assert replace(restored.meta, diffs=opening.meta(offset=0, digest=b"").diffs) == opening.meta(offset=0, digest=b"")
    assert restored.meta.tip.vectors[1] == _vector(coins)


def _vector(coins: list[tuple[bytes, bytes]]) -> bytes:
    accumulator = lthash.Accumulator()
    accumulator.add(lthash.elements(1, [key for key, _ in coins], [value for _, value in coins]))
    return accumulator.vector()


def test_base_state_without_coins(tmp_path: Path) -> None:
    """No coins are a state too."""
    objects, manifest = base(tmp_path, [])

    assert manifest.parts == ()
    assert restore(objects, tmp_path / "restored", Request()).meta.tip.root == manifest.root


@pytest.mark.parametrize("rest", [0, 1])
def test_a_coin_twice(tmp_path: Path, rest: int) -> None:
    """A set has each key once: also in a bucket."""
    coins = [(coin(number, 0, rest), b"v") for number in range(9)]
    coins += [(coin(3, 0, 1 - rest), b"w"), (coin(3, 0, rest), b"v")]

    with pytest.raises(CoinsCorrupt):
        base(tmp_path, coins)


@pytest.mark.parametrize(("raw_bytes_max", "parts"), [(1, 400), (2000, None), (1 << 20, 1)])
def test_parts_are_cut_between_keys(tmp_path: Path, raw_bytes_max: int, parts: int | None) -> None:
    """Parts follow each other without overlap, and partials sum up, wherever the cuts fall."""
    store = RocksStore(tmp_path / "store")
    keys = [coin(number % 200, number // 200) for number in range(400)]
    stored = [b"\1" + key[UTXO.rest] + b"value" for key in keys]
    store.write(Batch(state=dict(zip(UTXO.storage_keys(keys), stored, strict=True))))
    written = [one.part for one in write_parts(store.scan(), tmp_path, raw_bytes_max=raw_bytes_max)]

    assert sum_parts(written) == audit(store.scan())
    assert all(one.last_key < other.first_key for one, other in itertools.pairwise(written))
    assert len(written) == (parts or len(written))
    store.close()


def test_partials_must_sum_up(ferry: Ferry) -> None:
    """A manifest of other parts than the position's cannot be made."""
    manifest = ferry.manifests[0]

    with pytest.raises(AuditFailed):
        make_manifest(manifest.parts[1:], manifest.resumes)


def test_take_snapshot_of_nothing(tmp_path: Path) -> None:
    """A store without a position has no state to publish."""
    RocksStore(tmp_path / "store").close()

    with pytest.raises(Exception, match="no position"):
        take_snapshot([tmp_path / "store"], tmp_path / "scratch", MemoryObjects())
