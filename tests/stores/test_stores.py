"""One suite over the model and the real store; then what only a directory can do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rocksdict import SstFileWriter

from pipeline.errors import Locked, NotEmpty, StoreCorrupt, Unsupported
from pipeline.stores.base import FORMAT_KEY, FORMAT_VERSION, Batch, Store
from pipeline.stores.memory import MemoryStore
from pipeline.stores.rocksdb import RocksStore, state_options

keys = st.binary(min_size=1, max_size=3)
family = st.dictionaries(keys, st.none() | st.binary(max_size=4), max_size=6)


@pytest.fixture(params=["memory", "rocksdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store = MemoryStore() if request.param == "memory" else RocksStore(tmp_path / "store")
    yield opened
    opened.close()


def test_batch_reaches_all_families(store: Store) -> None:
    """One write changes state, undo and meta; equal keys in different families are different keys."""
    store.write(Batch(state={b"k": b"s", b"x": b""}, undo={b"k": b"u"}, meta={b"k": b"m"}))

    assert store.get([b"k", b"none", b"x", b"k"]) == [b"s", None, b"", b"s"]
    assert (store.get_undo(b"k"), store.get_undo(b"x")) == (b"u", None)
    assert (store.get_meta(b"k"), store.get_meta(b"x")) == (b"m", None)

    store.write(Batch(state={b"k": None, b"gone": None}, undo={b"k": None}, meta={b"k": None}))

    assert store.get([b"k", b"x"]) == [None, b""]
    assert store.get_undo(b"k") is store.get_meta(b"k") is None


def test_nothing_is_read_and_written(store: Store) -> None:
    """Empty reads and writes are fine."""
    store.write(Batch())

    assert store.get([]) == []
    assert list(store.scan()) == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(batches=st.lists(family, max_size=5), start=st.just(b"") | keys, stop=st.none() | keys)
def test_reads_and_scans_equal_a_dict(
    store: Store, batches: list[dict[bytes, bytes | None]], start: bytes, stop: bytes | None
) -> None:
    """Whatever was written: multi-gets and ascending scans show it, over any range."""
    store.write(Batch(state={key: None for key, _ in store.scan()}))
    model: dict[bytes, bytes] = {}
    for batch in batches:
        store.write(Batch(state=batch))
        model.update({key: value for key, value in batch.items() if value is not None})
        for key in [key for key, value in batch.items() if value is None]:
            model.pop(key, None)
    wanted = [key for batch in batches for key in batch]

    assert store.get(wanted) == [model.get(key) for key in wanted]
    assert list(store.scan()) == sorted(model.items())
    assert list(store.scan(start, stop)) == sorted(
        (key, value) for key, value in model.items() if key >= start and (stop is None or key < stop)
    )


def test_a_scan_keeps_its_own_bounds(store: Store) -> None:
    """Bounds made for one call and given away: the scan goes to where it was told to, not to where it finds other
    bytes."""
    store.write(Batch(state={number.to_bytes(2, "big"): b"v" for number in range(4096)}))
    scans = [store.scan(first.to_bytes(2, "big"), (first + 512).to_bytes(2, "big")) for first in range(0, 4096, 512)]

    assert [len(list(scan)) for scan in scans] == [512] * 8


def test_scan_sees_the_state_when_it_was_called(store: Store) -> None:
    """What is written after the call, even before the first entry is taken, is not in it."""
    before = {bytes([number]): b"old" for number in range(50)}
    store.write(Batch(state=before))
    scan = store.scan()
    store.write(Batch(state=dict.fromkeys(before, b"new") | {b"\x05": None, b"\xff": b"new"}))
    first = next(scan)
    store.write(Batch(state={b"\x30": None}))

    assert [first, *scan] == sorted(before.items())
    assert len(list(store.scan())) == 49


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., RocksStore]]:
    opened: list[RocksStore] = []

    def open_it(name: str = "store", *, read_only: bool = False) -> RocksStore:
        opened.append(RocksStore(tmp_path / name, read_only=read_only))
        return opened[-1]

    yield open_it
    for one in opened:
        one.close()


def test_content_survives_reopening(open_store: Callable[..., RocksStore]) -> None:
    """A closed store lets go of its directory and comes back with everything, for readers too."""
    first = open_store()
    first.write(Batch(state={b"k": b"s"}, undo={b"k": b"u"}, meta={b"k": b"m"}))
    first.flush()
    first.close()
    first.close()

    for read_only in (False, True):
        again = open_store(read_only=read_only)
        assert (again.get([b"k"]), again.get_undo(b"k"), again.get_meta(b"k")) == ([b"s"], b"u", b"m")
        again.close()


def test_checkpoint_is_independent(open_store: Callable[..., RocksStore], tmp_path: Path) -> None:
    """A checkpoint has the content of its moment and goes its own way."""
    store = open_store()
    store.write(Batch(state={b"k": b"1"}, meta={b"m": b"1"}))
    store.checkpoint(tmp_path / "copy")
    store.write(Batch(state={b"k": b"2"}))
    copy = open_store("copy")
    copy.write(Batch(state={b"only": b"copy"}))

    assert list(copy.scan()) == [(b"k", b"1"), (b"only", b"copy")]
    assert copy.get_meta(b"m") == b"1"
    assert list(store.scan()) == [(b"k", b"2")]


def test_ingested_files_are_state(open_store: Callable[..., RocksStore], tmp_path: Path) -> None:
    """Sorted files become state by being moved in."""
    store = open_store()
    files = [tmp_path / "1.sst", tmp_path / "2.sst"]
    for number, file in enumerate(files):
        writer = SstFileWriter(state_options())
        writer.open(str(file))
        writer[bytes([number])] = b"v"
        writer.finish()

    store.ingest(files)

    assert list(store.scan()) == [(b"\0", b"v"), (b"\x01", b"v")]
    assert not any(file.exists() for file in files)


def test_second_opener_is_locked_out(open_store: Callable[..., RocksStore], tmp_path: Path) -> None:
    """A directory has one owner, in this process or another; it may be tried again."""
    store = open_store()
    store.write(Batch(state={b"k": b"v"}))
    program = (
        "import sys; from pathlib import Path; from pipeline.errors import Locked\n"
        "from pipeline.stores.rocksdb import RocksStore\n"
        "try: RocksStore(Path(sys.argv[1]))\n"
        "except Locked: sys.exit(9)"
    )

    with pytest.raises(Locked):
        open_store()
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "store")], check=False).returncode == 9
    assert store.get([b"k"]) == [b"v"]


def test_newer_directory_is_refused(open_store: Callable[..., RocksStore]) -> None:
    """A directory made by a newer version is not touched, and let go of."""
    store = open_store()
    assert store.get_meta(FORMAT_KEY) == str(FORMAT_VERSION).encode()
    store.write(Batch(meta={FORMAT_KEY: str(FORMAT_VERSION + 1).encode()}))
    store.close()

    for _ in range(2):
        with pytest.raises(Unsupported, match=f"has format {FORMAT_VERSION + 1}"):
            open_store()


@pytest.mark.parametrize(
    "names", [[], ["LOCK"], ["LOCK", "LOG", "LOG.old.17", "IDENTITY", "MANIFEST-000001", "000001.dbtmp", "000004.log"]]
)
def test_directory_that_never_came_to_life_is_fresh(
    open_store: Callable[..., RocksStore], tmp_path: Path, names: list[str]
) -> None:
    """A crash before RocksDB wrote CURRENT leaves nothing that matters."""
    (tmp_path / "store").mkdir()
    for name in names:
        (tmp_path / "store" / name).write_bytes(b"half")

    assert list(open_store().scan()) == []


@pytest.mark.parametrize(("name", "error"), [("000009.sst", StoreCorrupt), ("photo.jpg", NotEmpty), (".git", NotEmpty)])
def test_directory_with_anything_else_is_left_alone(
    open_store: Callable[..., RocksStore], tmp_path: Path, name: str, error: type[Exception]
) -> None:
    """Data without CURRENT is damage; other people's files are other people's."""
    (tmp_path / "store").mkdir()
    for file in (name, "LOCK"):
        (tmp_path / "store" / file).write_bytes(b"precious")

    with pytest.raises(error):
        open_store()
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == sorted([name, "LOCK"])


WRITE_LOOP = """
import sys
from pathlib import Path
from pipeline.stores.base import Batch
from pipeline.stores.rocksdb import RocksStore

store = RocksStore(Path(sys.argv[1]))
number = int(store.get_meta(b"number") or b"0")
while True:
    number += 1
    value = str(number).encode()
    keys = [bytes([at, number % 7]) for at in range(200)]
    store.write(Batch(
        state=dict.fromkeys(keys, value),
        undo={value: b"u", str(number - 50).encode(): None},
        meta={b"number": value},
    ))
    if number % 40 == 0:
        print(number, flush=True)
"""


def test_killed_writer_leaves_a_whole_batch(open_store: Callable[..., RocksStore], tmp_path: Path) -> None:
    """Killed at any moment, a store stands at the end of one batch, not before what it was told to be written."""
    for kill in range(1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE_LOOP, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(2 * kill)][-1]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = open_store()
        number = int(store.get_meta(b"number") or b"0")
        whole = {at % 7: str(at).encode() for at in range(max(1, number - 6), number + 1)}

        assert number >= told
        assert dict(store.scan()) == {bytes([at, rest]): value for at in range(200) for rest, value in whole.items()}
        held = [at for at in range(max(0, number - 100), number + 3) if store.get_undo(str(at).encode()) is not None]
        assert held == list(range(max(1, number - 49), number + 1))
        store.close()
