"""Events that do not follow: the primary stops at the record and names it, and nothing that was applied is lost. A
source that opens a new epoch behind a bad record goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.block import BlockRef, Op
from pipeline.errors import (
    BlockInvalid,
    EventCorrupt,
    RewindTooDeep,
    StateferryError,
    Unsupported,
    WalkGap,
    WalkInvalid,
    WrongChain,
)
from tests.chains import block_files
from tests.topology.commands import Site, same_state
from tests.topology.forge import Source, coin_key, coin_name, ops

pytestmark = pytest.mark.usefixtures("each_broker")

LATEST = 4  # height of the base site
ONE, TWO = coin_key(1), coin_key(2)


@pytest.fixture(scope="module")
def base(each_broker: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Five blocks, at both nodes."""
    site = Site(tmp_path_factory.mktemp("base") / "site")
    site.ingest(*block_files("reorg_btcd", "main"))
    site.follow_both()
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    return base.copy(tmp_path / "site")


def tip(site: Site) -> BlockRef:
    ref = site.meta("p").tip.ref
    assert ref is not None
    return ref


def stops(site: Site, error: type[StateferryError], *says: str) -> None:
    """The primary stops at the last record with this error, each time, and holds what it held; the replica too."""
    before, content = site.meta("p"), site.content("p")
    offset = len(site.records("blocks")) - 1
    for _ in range(2):
        said = site.here("run", "--role", "primary", "--until-idle").failed(error)
        for word in (*says, f"topic blocks, partition 0, offset {offset}"):
            assert word in said
    site.follow("replica", "r")

    after = site.meta("p")
    assert (after.tip, after.seq, after.frame_id) == (before.tip, before.seq, before.frame_id)
    assert site.content("p") == content
    same_state(site, ["p", "r"])


def goes_on(site: Site, keys: set[bytes]) -> None:
    """A source that resumes where the store is makes what stands before it void."""
    at = tip(site)
    walk = site.meta("p").walk
    source = Source(site, resume=walk + 1)
    source.connect(at, ops((Op.CREATE, coin_key(77))))
    before = site.content("p")
    site.follow_both()

    assert tip(site).height == at.height + 1
    assert len(site.content("p")) == len(before) + 1
    same_state(site, ["p", "r"])
    for key in keys | {coin_key(77)}:
        assert site.here("get", coin_name(key), node="r").code == 0


@pytest.mark.parametrize(
    ("said", "key", "index"),
    [
        pytest.param([(Op.DELETE, ONE), (Op.DELETE, ONE)], ONE, 0, id="double spend"),
        pytest.param([(Op.DELETE, TWO)], TWO, 0, id="spend of nothing"),
        pytest.param([(Op.CREATE, ONE)], ONE, 0, id="coin created twice"),
        pytest.param([(Op.CREATE, TWO), (Op.DELETE, TWO), (Op.DELETE, TWO)], TWO, 0, id="double spend within a block"),
    ],
)
def test_invalid_block(said: list[tuple[Op, bytes]], key: bytes, index: int, site: Site) -> None:
    """The coin is named as txid:index, with the height."""
    source = Source(site)
    at = source.connect(tip(site), ops((Op.CREATE, ONE)))
    site.follow_both()
    source.connect(at, ops(*said))

    stops(site, BlockInvalid, coin_name(key), str(at.height + 1))
    goes_on(site, {ONE})


def test_spent_in_an_earlier_block(site: Site) -> None:
    """A double spend over two blocks that are computed in one go: the first of them is applied."""
    source = Source(site)
    at = source.connect(tip(site), ops((Op.CREATE, ONE), (Op.CREATE, TWO)))
    at = source.connect(at, ops((Op.DELETE, ONE)))
    source.connect(at, ops((Op.DELETE, ONE)))
    said = site.here("run", "--role", "primary", "--until-idle").failed(BlockInvalid)
    assert coin_name(ONE) in said and str(at.height + 1) in said
    site.follow("primary", "p", "--until-height", at.height)
    assert tip(site) == at

    stops(site, BlockInvalid, coin_name(ONE))
    goes_on(site, {TWO})


def test_repeats_are_ignored(site: Site) -> None:
    """An event read again changes nothing, however often."""
    source = Source(site)
    at = source.connect(tip(site), ops((Op.CREATE, ONE)))
    source.repeat()
    site.append("blocks", *site.records("blocks")[1:])
    at = source.connect(at, ops((Op.DELETE, ONE)))
    source.repeat()
    site.follow_both()

    assert tip(site) == at
    assert site.kinds() == {"GENERATION": 1, "EPOCH": 2, "APPLY": LATEST + 3}
    same_state(site, ["p", "r"])


@pytest.mark.parametrize("back", [0, 2])
def test_another_event_under_an_old_number(back: int, site: Site) -> None:
    """What was applied under it was another one: the topic is not the one that was followed."""
    source = Source(site)
    at = source.connect(tip(site), ops((Op.CREATE, ONE)))
    site.follow_both()
    if back:
        source.rewind(BlockRef(at.height - 3, bytes(32)), walk=source.walk - back)
    else:
        source.connect(tip(site), ops((Op.CREATE, TWO)), walk=source.walk)

    stops(site, WalkInvalid, f"event {source.walk - back} is", "was applied")
    goes_on(site, {ONE})


def test_gap_in_walk_numbers(site: Site) -> None:
    """A missing event stops the primary, which says how many are missing."""
    source = Source(site)
    source.connect(tip(site), ops((Op.CREATE, ONE)), walk=source.walk + 3)

    stops(site, WalkGap, "2 are missing")
    goes_on(site, set())


def test_source_that_resumes_too_high(site: Site) -> None:
    """A new source writer that leaves numbers out is a gap as well."""
    Source(site, resume=LATEST + 4)

    stops(site, WalkGap, str(LATEST + 4))


def test_event_of_another_chain(site: Site) -> None:
    """A chain id that is not the data directory's."""
    source = Source(site)
    source.connect(tip(site), ops(), chain_id="dogecoin")

    stops(site, WrongChain, "dogecoin", "bitcoin")


def test_writer_not_in_force(site: Site) -> None:
    """What a fenced source, or one of another generation, still says is void."""
    old = Source(site)
    new = Source(site)
    old.connect(tip(site), ops((Op.CREATE, ONE)))
    new.connect(tip(site), ops((Op.CREATE, ONE)), generation=bytes(16))
    new.walk -= 1
    at = new.connect(tip(site), ops((Op.CREATE, TWO)))
    site.follow_both()

    assert tip(site) == at
    same_state(site, ["p", "r"])


@pytest.mark.parametrize(
    ("error", "says", "do"),
    [
        (WalkInvalid, "has the parent", lambda source, at: source.connect(BlockRef(at.height, bytes(32)), ops())),
        (WalkInvalid, "has the parent", lambda source, at: source.connect(BlockRef(1, at.block_hash), ops())),
        (WalkInvalid, "not on the branch", lambda source, at: source.rewind(BlockRef(2, b"\x07" * 32))),
        (WalkInvalid, "the tip is", lambda source, at: source.rewind(BlockRef(at.height, at.block_hash))),
        (RewindTooDeep, "final height", lambda source, at: source.rewind(BlockRef(0, bytes(32)))),
    ],
)
def test_event_that_does_not_follow(
    error: type[StateferryError],
    says: str,
    do: Callable[[Source, BlockRef], object],
    tmp_path: Path,
) -> None:
    """A wrong parent, height or fork point."""
    site = Site(tmp_path)
    site.ingest(*block_files("reorg_btcd", "main"))
    site.follow_both("--finality", 3)
    do(Source(site), tip(site))

    stops(site, error, says)
    if error is WalkInvalid:
        goes_on(site, set())


@pytest.mark.parametrize("at", [0, 5, 20, -1])
def test_record_that_is_no_event(at: int, site: Site) -> None:
    """A damaged record stops the reader of blocks: to skip it would lose data."""
    source = Source(site)
    source.connect(tip(site), ops((Op.CREATE, ONE)))
    (record,) = site.cut("blocks", 1)
    damaged = bytearray(record)
    damaged[at] ^= 0x20
    site.append("blocks", bytes(damaged))

    stops(site, EventCorrupt)
    goes_on(site, set())


def test_event_of_a_newer_version(site: Site) -> None:
    """It means something that this build does not know."""
    source = Source(site)
    source.connect(tip(site), ops((Op.CREATE, ONE)))
    (record,) = site.cut("blocks", 1)
    site.append("blocks", record[:4] + bytes([2]) + record[5:])
    stops(site, Unsupported, "version 2", "upgrade")
    site.cut("blocks", 1)
    site.append("blocks", record)
    site.follow_both()

    assert tip(site).height == LATEST + 1
    same_state(site, ["p", "r"])
