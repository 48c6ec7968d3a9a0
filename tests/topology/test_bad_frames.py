"""Frames that are not what they say: void ones are passed by and counted, unknown ones stop a node, and one in force
that is wrong puts it in quarantine, from which only a command leads out. A directory never holds anything of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import chunk, frame
from pipeline.codec import Codec
from pipeline.errors import (
    AuditFailed,
    Diverged,
    FrameCorrupt,
    FrameIdMismatch,
    NotFound,
    Quarantined,
    RootMismatch,
    SeqConflict,
    SeqGap,
    StateferryError,
    Unsupported,
    UsageError,
    WrongChain,
)
from pipeline.stores.base import FORMAT_KEY, Batch
from tests.chains import expected, load_blocks, write_hex_lines
from tests.topology.commands import Site, same_state
from tests.topology.forge import REQUIRED_AT, VERSION_AT, changed, patched, with_body

pytestmark = pytest.mark.usefixtures("each_broker")

NAME = "regtest_core_getblockstats"
AT = 101  # height of the replica in the base site; the block on top of it has several transactions
FINALITY = 10


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A primary at the end of its chain with a snapshot, a replica two blocks below."""
    folder = tmp_path_factory.mktemp("base")
    site = Site(folder / "site")
    site.ingest(write_hex_lines(folder / "blocks.hex", load_blocks(NAME)))
    site.follow("primary", "p", "--finality", FINALITY)
    site.here("snapshot").ok()
    site.here("run", "--role", "replica", "--until-height", AT, node="r").ok()
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def next_offset(site: Site) -> int:
    """Where the first frame stands that the replica has not read."""
    return site.meta("r").diffs.next_offset


def forge(site: Site, change: Callable[[bytes], bytes]) -> bytes:
    """Change the next frame in the log; the one that stood there."""
    offset = next_offset(site)
    record = site.records(site.diffs)[offset]
    site.replace(site.diffs, offset, change(record))
    return record


def stops(site: Site, error: type[StateferryError]) -> str:
    """The replica stops with this error, and holds what it held."""
    before, content = site.meta("r"), site.content("r")
    said = site.here("run", "--role", "replica", "--until-idle", node="r").failed(error)

    assert site.meta("r") == before
    assert site.content("r") == content
    return said


def goes_on(site: Site, void: dict[str, int] | None = None) -> None:
    """The replica gets to the primary's state."""
    found = site.follow("replica", "r")

    assert found["void_records"] == (void or {})
    same_state(site, ["p", "r"])
    (end,) = expected(NAME)
    assert site.muhash("r")["muhash"] == end["muhash"]


# Stop


@pytest.mark.parametrize(
    ("at", "data", "says"),
    [
        pytest.param(VERSION_AT, b"\x02\x00", "version 2", id="version"),
        pytest.param(REQUIRED_AT, b"\x80\x00\x00\x00", "unknown features", id="feature"),
        pytest.param(7, b"\x09", "codec 9", id="codec"),
        pytest.param(6, b"\x09", "kind 9", id="kind"),
    ],
)
def test_unknown_format(at: int, data: bytes, says: str, site: Site) -> None:
    """In force, but of another version: a replica stops, twice, and goes on where it was with the build that knows."""
    record = forge(site, lambda record: patched(record, at, data))
    for _ in range(2):
        assert says in stops(site, Unsupported)
    site.here("status", node="r").ok()
    site.replace(site.diffs, next_offset(site), record)

    goes_on(site)


# Void


def test_void_records(site: Site) -> None:
    """Damaged, of another generation, writer, epoch or shard: passed by, and counted by their reason."""
    meta = site.meta("r")
    frames = site.cut(site.diffs, len(site.records(site.diffs)) - next_offset(site))
    good = frames[0]
    piece = chunk.cut(
        good * 3,
        generation=meta.generation,
        epoch=meta.epoch + 5,
        writer=meta.writer,
        number=meta.seq + 1,
        record_bytes_max=len(good),
    )[0]
    void = [
        b"garbage",
        good[:-1],
        good[:200] + bytes([good[200] ^ 1]) + good[201:],
        patched(changed(good, writer=bytes(16), post_root=bytes(32)), VERSION_AT, b"\x09\x00"),
        changed(good, epoch=meta.epoch + 1),
        changed(good, epoch=meta.epoch - 1 or 7),
        changed(good, generation=bytes(16)),
        changed(good, shard=1, shards=2),
        piece,
        piece[:-1],
        site.records(site.diffs)[1],
    ]
    site.append(site.diffs, *void, *frames)
    counts = {"damaged": 4, "writer": 4, "generation": 1, "shard": 1, "epoch": 1}
    with site.running("replica", "r") as worker:
        found = site.wait_for("r", worker, height=103)
        assert found["void_records"] == counts

    (end,) = expected(NAME)
    assert site.muhash("r")["muhash"] == end["muhash"]
    # The primary finds another log than it wrote, takes back what stood elsewhere, and reads it again.
    assert site.follow("primary", "p")["void_records"] == counts
    site.follow("replica", "r")
    same_state(site, ["p", "r"])


def test_repeated_frame(site: Site) -> None:
    """The frame applied last, once more, is no news."""
    frames = site.cut(site.diffs, len(site.records(site.diffs)) - next_offset(site))
    last = site.records(site.diffs)[-1]
    site.append(site.diffs, last, *(twice for record in frames for twice in (record, record)))

    goes_on(site)


# Quarantine


def other_key_root(record: bytes) -> bytes:
    roots = frame.peek(record).table_roots
    return changed(record, table_roots={table_id: bytes(32) for table_id in roots})


FORGERIES: list[Any] = [
    pytest.param(lambda record: changed(record, post_root=b"\x01" * 32), RootMismatch, id="root"),
    pytest.param(other_key_root, RootMismatch, id="table root"),
    pytest.param(lambda record: changed(record, prev_root=b"\x01" * 32), RootMismatch, id="root before"),
    pytest.param(lambda record: changed(record, frame_id=b"\x01" * 32), FrameIdMismatch, id="id"),
    pytest.param(lambda record: changed(record, prev_frame_id=b"\x01" * 32), SeqConflict, id="link"),
    pytest.param(lambda record: changed(record, parent_hash=b"\x01" * 32), SeqConflict, id="parent"),
    pytest.param(lambda record: changed(record, op_count=1), FrameCorrupt, id="op count"),
    pytest.param(
        lambda record: changed(record, seq=frame.peek(record).seq - 1), SeqConflict, id="other frame at a seq"
    ),
]


@pytest.mark.parametrize(("change", "error"), FORGERIES)
def test_wrong_frame(change: Callable[[bytes], bytes], error: type[StateferryError], site: Site) -> None:
    """Whatever is wrong in a frame in force: the evidence is kept, and nothing serves or follows this store."""
    forged = change(site.records(site.diffs)[next_offset(site)])
    record = forge(site, lambda _: forged)
    offset, height = next_offset(site), site.meta("r").tip.height
    stops_quarantined(site, error)
    (evidence,) = site.here("quarantine", node="r").ok()["evidence"]
    assert (evidence["error"], evidence["height"], evidence["topic"]) == (error.__name__, height, site.diffs)
    assert evidence["offset"] == offset
    assert (Path(evidence["folder"]) / "record.bin").read_bytes() == forged

    for words in (
        ("run", "--role", "replica", "--until-idle"),
        ("run", "--role", "primary", "--until-idle"),
        ("status",),
        ("scan",),
        ("root",),
        ("verify",),
        ("get", "00" * 36),
        ("snapshot",),
    ):
        assert "stateferry quarantine" in site.here(*words, node="r").failed(Quarantined)
    leave(site, record)


def stops_quarantined(site: Site, error: type[StateferryError]) -> None:
    before, content = site.meta("r"), site.content("r")
    site.here("run", "--role", "replica", "--until-idle", node="r").failed(error)

    assert site.meta("r") == before
    assert site.content("r") == content
    assert site.here("quarantine", node="r").ok()["quarantined"] is True


def leave(site: Site, record: bytes) -> None:
    """Out of quarantine by a restore; the evidence is kept. With the right record in the log, all goes on."""
    site.replace(site.diffs, next_offset(site), record)
    done = site.here("quarantine", "--restore", node="r").ok()
    assert (done["quarantined"], done["restored"], done["height"]) == (False, True, 103 - FINALITY)
    assert [*Path(done["evidence_kept_in"]).glob("*/record.bin")] and Path(done["old_store"]).is_dir()
    assert site.here("quarantine", node="r").ok() == {"quarantined": False, "evidence": []}

    assert site.here("status", node="r").ok()["proof"] == "proven"
    goes_on(site)


def test_flipped_content(site: Site) -> None:
    """A byte anywhere in a frame's body, changed under a right checksum: quarantine, and nothing is changed."""
    offset = next_offset(site)
    record = site.records(site.diffs)[offset]
    size = len(frame.decode(record).body)
    assert size > 50

    before, content = site.meta("r"), site.content("r")
    for at in range(0, size, max(1, size // 6)):
        site.replace(site.diffs, offset, with_body(record, at, 0x11))
        done = site.here("run", "--role", "replica", "--until-idle", node="r")
        assert done.code in (Diverged.exit_code, FrameCorrupt.exit_code), (at, done)
        assert site.here("quarantine", "--recheck", node="r").ok()["recheck"]["verified"] is True
    assert site.meta("r") == before and site.content("r") == content
    site.replace(site.diffs, offset, record)

    goes_on(site)


def test_recheck_meets_the_same_record_again(site: Site) -> None:
    """The store is sound, the record is not: the way on is another record, or another state to start from."""
    record = forge(site, lambda record: changed(record, post_root=b"\x01" * 32))
    for _ in range(2):
        stops_quarantined(site, RootMismatch)
        assert site.here("quarantine", "--recheck", node="r").ok()["recheck"]["verified_height"] == AT
    site.here("quarantine", "--recheck", node="r").failed(NotFound)
    site.here("quarantine", "--recheck", "--restore", node="r").failed(UsageError)
    site.replace(site.diffs, next_offset(site), record)

    goes_on(site)


def test_missing_frame(site: Site) -> None:
    """A gap names how much is missing, and is no divergence."""
    frames = site.cut(site.diffs, len(site.records(site.diffs)) - next_offset(site))
    site.append(site.diffs, *frames[1:])
    assert "1 are missing" in stops(site, SeqGap)
    assert site.here("quarantine", node="r").ok()["quarantined"] is False
    site.cut(site.diffs, len(frames) - 1)
    site.append(site.diffs, *frames)

    goes_on(site)


def test_frame_of_another_chain(site: Site) -> None:
    """A chain id that is not the data directory's."""
    record = forge(site, lambda record: changed(record, chain_id="dogecoin"))
    assert "dogecoin" in stops(site, WrongChain)
    site.replace(site.diffs, next_offset(site), record)

    goes_on(site)


def test_frame_in_another_codec_is_the_same_frame(site: Site) -> None:
    """Compression is not content: the id stays, and the replica takes it."""
    record = forge(site, lambda record: changed(record, codec=Codec.NONE, optional=0x8000))
    assert frame.peek(record).codec is not Codec.NONE

    found = site.here("run", "--role", "replica", "--until-height", AT + 1, node="r").ok()
    assert found["height"] == AT + 1
    goes_on(site)


# The directory


def test_directory_of_a_newer_version(site: Site) -> None:
    """Everything that opens the store refuses it, and nothing changes it."""
    with site.store("r") as store:
        held = store.get_meta(FORMAT_KEY)
        assert held is not None
        store.write(Batch(meta={FORMAT_KEY: str(int(held) + 1).encode()}))
    for words in (("run", "--role", "replica", "--until-idle"), ("status",), ("root",), ("verify",), ("snapshot",)):
        assert f"format {int(held) + 1}" in site.here(*words, node="r").failed(Unsupported)


def test_changed_value_is_found_by_verify(site: Site) -> None:
    """Bit rot in a value that nobody touches: a full verification finds it, and quarantines the node."""
    with site.store("r") as store:
        storage_key, stored = next(store.scan())
        rotten = bytes([*stored[:-1], stored[-1] ^ 1])
        store.write(Batch(state={storage_key: rotten}))
    assert "does not hold what its vector says" in site.here("verify", "--level", "full", node="r").failed(AuditFailed)
    site.here("scan", node="r").failed(Quarantined)
    (evidence,) = site.here("quarantine", node="r").ok()["evidence"]
    assert evidence["error"] == "AuditFailed"
    site.here("quarantine", "--recheck", node="r").failed(AuditFailed)
    assert site.here("quarantine", node="r").ok()["quarantined"] is True
    assert site.here("quarantine", "--restore", node="r").ok()["quarantined"] is False

    goes_on(site)
    assert replace(site.meta("r").tip, seq=0) == replace(site.meta("p").tip, seq=0)


def test_changed_value_is_found_beside_a_worker(site: Site) -> None:
    """The worker that owns the rotten store ends with the divergence."""
    with site.store("r") as store:
        storage_key, stored = next(store.scan())
        store.write(Batch(state={storage_key: bytes([*stored[:-1], stored[-1] ^ 1])}))
    with site.running("replica", "r") as worker:
        site.wait_for("r", worker, height=103)
        site.here("verify", node="r").failed(AuditFailed)
        _, stderr = worker.communicate()
        assert worker.returncode == AuditFailed.exit_code and "AuditFailed" in stderr
    site.here("run", "--role", "replica", "--until-idle", node="r").failed(Quarantined)
