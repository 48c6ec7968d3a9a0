"""Commands for tests: in a process of their own, or in this one where the process is not what is tested.

A `Site` is one broker, one object store, and the data directories of the nodes that use them. Every answer is a `Done`.
The broker is an embedded log in the site's folder, or, for tests that use `each_broker`, Kafka.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click

from pipeline import chunk, frame
from pipeline.errors import NotFound, StateferryError
from pipeline.frame import Kind
from pipeline.generation import Generation, decode_generation, history
from pipeline.position import Meta, decode_meta
from pipeline.sources import coins
from pipeline.state import UTXO
from pipeline.stores.base import META_KEY
from pipeline.stores.rocksdb import RocksStore
from tests.kafka.fixtures import Place
from tests.processes import ROOT, Command
from tests.transports.log import Log
from topology import control, worker
from topology.cli import cli
from topology.transports.base import TopicSpec
from topology.transports.sqlite_file import OFFSET_BITS

_RUN = secrets.token_hex(8)
WAIT_S = 60.0
"""A condition that does not come true within this has failed: on a busy machine everything here takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command that ended. ``document``: what --json printed; None if it printed none."""

    code: int
    document: Any
    stderr: str

    def ok(self) -> Any:
        """The document of a command that must have worked."""
        assert self.code == 0, (self.code, self.document, self.stderr)

        return self.document

    def failed(self, error: type[StateferryError]) -> str:
        """The whole message of a command that must have failed so."""
        assert (self.code, self.document and self.document.get("error")) == (error.exit_code, error.__name__), (
            self.code,
            self.document,
            self.stderr,
        )
        assert f"{error.__name__}: " in self.stderr

        return f"{self.document['message']} ({self.document['where']}); {self.document['way_out']}"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without settings of ours, and ``extra``."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("STATEFERRY_")}
    return bare | {"PYTHONPATH": str(ROOT)} | extra


def start(*args: object, env: dict[str, str] | None = None, file_bytes_max: int | None = None) -> Command:
    """A command in a process of its own. ``file_bytes_max``: no file it writes gets longer."""
    environ = environment(**(env or {}))
    return Command(*map(str, args), environment=environ, folder=ROOT, file_bytes_max=file_bytes_max)


def finish(process: Command) -> Done:
    """Wait for a command's end."""
    try:
        stdout, stderr = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        _, stderr = process.communicate()
        raise AssertionError(f"{process.args!r} did not end: {stderr}") from None
    return Done(code=process.returncode, document=_document(stdout), stderr=stderr)


def command(*args: object, **kwargs: Any) -> Done:
    """A command in a process of its own, to its end."""
    return finish(start(*args, **kwargs))


def here(*args: object) -> Done:
    """The same in this process. It is idle at once when there is nothing more to read."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(worker, "IDLE_S", 0.0),
        mock.patch.object(sys, "argv", ["stateferry", *map(str, args)]),
    ):
        try:
            result = cli.main([*map(str, args)], standalone_mode=False)
            code = result if isinstance(result, int) else 0  # what `Exit` carried
        except StateferryError as error:
            from topology.cli import _show  # noqa: PLC0415

            _show(error)
            code = error.exit_code
        except click.ClickException as error:
            error.show()
            code = 2
    return Done(code=code, document=_document(stdout.getvalue()), stderr=stderr.getvalue())


def _document(stdout: str) -> Any:
    return json.loads(stdout) if stdout.startswith(("{", "[")) else None


def wait_until(holds: Callable[[], bool], process: Command | None = None) -> None:
    """Until a condition is true; a process that ends before it is a failure."""
    began_s = time.monotonic()
    while not holds():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"{process.args!r} ended early: {finish(process)}")
        waited_s = time.monotonic() - began_s
        assert waited_s < WAIT_S, "the condition did not come true"

        # To look costs the worker and this process something, which others may have while a session runs out.
        time.sleep(min(0.02 + waited_s / 20, 0.3))


class Site:
    """One chain's places in a folder."""

    kafka_url = ""
    """Where the topics of every site are; empty: in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.sqlite"
        self.place = Place(url=f"embedded://{self.log}")
        if self.kafka_url:
            prefix = hashlib.sha256(f"{_RUN} {folder}".encode()).hexdigest()[:12]
            self.place = Place(url=self.kafka_url, prefix=f"site-{prefix}.")
        self.objects = folder / "objects"
        self.bucket_url = ""  # where the objects are; empty: in `objects`
        folder.mkdir(parents=True, exist_ok=True)

    def dir(self, node: str) -> Path:
        return self.folder / node

    def options(self, node: str) -> list[str]:
        return [
            *(*self.place.options, "--objects", self.bucket_url or f"file://{self.objects}"),
            *("--data-dir", str(self.dir(node)), "--json"),
        ]

    def here(self, *args: object, node: str = "p") -> Done:
        return here(*args, *self.options(node))

    def command(self, *args: object, node: str = "p", **kwargs: Any) -> Done:
        return command(*args, *self.options(node), **kwargs)

    def start(self, *args: object, node: str = "p", **kwargs: Any) -> Command:
        return start(*args, *self.options(node), **kwargs)

    @contextlib.contextmanager
    def running(self, role: str, node: str, *args: object, **kwargs: Any) -> Iterator[Command]:
        """A worker that answers; ended by SIGTERM, with exit code 0, if it still runs."""
        process = self.start("run", "--role", role, *args, node=node, **kwargs)
        try:
            wait_until((self.dir(node) / "control.sock").exists, process)
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                finish(process).ok()
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def wait_for(self, node: str, process: Command | None = None, **wanted: object) -> Any:
        """Until a running worker's status has these values; the status."""
        return self.wait_for_status(
            node, process, lambda status: all(status.get(name) == value for name, value in wanted.items())
        )

    def wait_for_status(self, node: str, process: Command | None, wanted: Callable[[dict[str, Any]], bool]) -> Any:
        """Until a running worker's status is as wanted; the status."""
        path, found = self.dir(node) / "control.sock", {}

        def holds() -> bool:
            with contextlib.suppress(StateferryError):
                found.update(control.ask(path, {"what": "status"}) or {})
            return bool(found) and wanted(found)

        wait_until(holds, process)
        return found

    def copy(self, folder: Path) -> Site:
        """The same places with the same content in another folder, while nothing runs."""
        shutil.copytree(self.folder, folder)
        copied = Site(folder)
        if self.place.is_kafka:
            with self.opened_log() as source, copied.opened_log() as target:
                names = [(one.blocks_topic, one.diffs_topic) for one in self._generations(source)]
                for topic in ("generations", *(name for pair in names for name in pair)):
                    with contextlib.suppress(NotFound):
                        records = source.read(topic)
                        target.ensure_topics([TopicSpec(name=topic, partitions=1)])
                        target.append(topic, 0, [(record.key, record.value) for record in records])
        return copied

    @staticmethod
    def _generations(log: Log) -> list[Generation]:
        with contextlib.suppress(NotFound):
            return history(record.value for record in log.read("generations"))
        return []

    def ingest(self, *files: Path | str) -> Any:
        return self.here("ingest", "bitcoin", *files).ok()

    def follow(self, role: str, node: str, *args: object) -> Any:
        """A worker in this process, until it has read all there is."""
        return self.here("run", "--role", role, "--until-idle", *args, node=node).ok()

    def follow_both(self, *args: object) -> tuple[Any, Any]:
        return self.follow("primary", "p", *args), self.follow("replica", "r", *args)

    def put_to_sleep(self, process: Command) -> None:
        """Stop a worker until it gets SIGCONT, at a time when it does not hold the embedded log's lock."""
        while True:
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: process.is_stopped, process)  # until then it may still take the lock
            if self.place.is_kafka or not self._is_log_locked():
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)

    # The log

    def _is_log_locked(self) -> bool:
        try:
            with contextlib.closing(sqlite3.connect(self.log, timeout=0)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        return False

    @contextlib.contextmanager
    def opened_log(self) -> Iterator[Log]:
        log = Log(self.place)
        try:
            yield log
        finally:
            log.close()

    def sql(self, statement: str, *values: object) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.log, timeout=WAIT_S)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    def _partition(self, topic: str) -> int:
        ((found,),) = self.sql(
            "SELECT p.id FROM partition p JOIN topic t ON t.id = p.topic_id WHERE t.name = ? AND p.number = 0", topic
        )
        return int(found)

    def records(self, topic: str) -> list[bytes]:
        """All records of a topic, in order."""
        if self.place.is_kafka:
            with self.opened_log() as log:
                return [record.value for record in log.read(topic)]
        base = self._partition(topic) << OFFSET_BITS
        end = base + (1 << OFFSET_BITS)
        rows = self.sql("SELECT value FROM record WHERE id >= ? AND id < ? ORDER BY id", base, end)
        return [value for (value,) in rows]

    def append(self, topic: str, *records: bytes) -> None:
        """Records at the end of a topic, as any writer may put them there."""
        if self.place.is_kafka:
            with self.opened_log() as log:
                log.append(topic, 0, [(None, record) for record in records])
                return
        partition = self._partition(topic)
        with contextlib.closing(sqlite3.connect(self.log, timeout=WAIT_S)) as connection, connection:
            for record in records:
                more = "UPDATE partition SET end = end + 1 WHERE id = ? RETURNING end"
                ((end,),) = connection.execute(more, (partition,)).fetchall()
                row = (partition << OFFSET_BITS) | (end - 1)
                new = "INSERT INTO record (id, timestamp_ms, key, value) VALUES (?, 0, NULL, ?)"
                connection.execute(new, (row, record))

    def cut(self, topic: str, records: int) -> list[bytes]:
        """Take the last records off a topic, as a power cut of a broker without fsync does. Returns them."""
        if self.place.is_kafka:
            found = self.records(topic)
            kept, lost = found[:-records], found[-records:]
            self._remake(topic, kept)
            return lost
        partition = self._partition(topic)
        lost = self.records(topic)[-records:]
        ((end,),) = self.sql("UPDATE partition SET end = end - ? WHERE id = ? RETURNING end", records, partition)
        self.sql(
            "DELETE FROM record WHERE id >= ? AND id < ?",
            (partition << OFFSET_BITS) | end,
            (partition + 1) << OFFSET_BITS,
        )
        return lost

    def replace(self, topic: str, offset: int, record: bytes) -> None:
        if self.place.is_kafka:
            records = self.records(topic)
            records[offset] = record
            self._remake(topic, records)
            return
        row = (self._partition(topic) << OFFSET_BITS) | offset
        self.sql("UPDATE record SET value = ? WHERE id = ?", record, row)

    def _remake(self, topic: str, records: Sequence[bytes]) -> None:
        """A Kafka topic made anew with other records: nothing else changes what is in one."""
        with self.opened_log() as log:
            log.remake(topic, [(None, record) for record in records])

    @property
    def diffs(self) -> str:
        """The diffs topic of the generation in force."""
        return decode_generation(self.records("generations")[-1]).diffs_topic

    def kinds(self) -> Counter[str]:
        """How many frames of each kind are on the diffs topic."""
        return Counter(kind.name for kind in map(kind_of, self.records(self.diffs)) if kind is not None)

    def frame_ids(self) -> list[str]:
        """Ids of all numbered frames on the diffs topic, in order."""
        headers = (frame.peek(record) for record in self.records(self.diffs) if kind_of(record) is not None)
        return [header.frame_id.hex() for header in headers if header.is_numbered]

    # Stores

    @contextlib.contextmanager
    def store(self, node: str, *, read_only: bool = False) -> Iterator[RocksStore]:
        """A node's store, while no worker has it. To read takes half as long to open, and changes nothing."""
        store = RocksStore(self.dir(node) / "store", read_only=read_only)
        try:
            yield store
        finally:
            store.close()

    def meta(self, node: str) -> Meta:
        with self.store(node, read_only=True) as store:
            data = store.get_meta(META_KEY)
        assert data is not None

        return decode_meta(data)

    def content(self, node: str) -> dict[bytes, bytes]:
        with self.store(node, read_only=True) as store:
            return dict(store.scan())

    def muhash(self, node: str) -> Any:
        return self.here("root", "--interop", "muhash", node=node).ok()


def kind_of(record: bytes) -> Kind | None:
    """The kind of a frame; None for a chunk and for what is no frame."""
    if chunk.is_chunk(record) or frame.peek_prefix(record) is None:
        return None
    return frame.peek(record).kind


def same_state(site: Site, nodes: Sequence[str]) -> None:
    """Nodes stand at the same position, with the same links, and hold the same bytes."""
    first, *others = nodes
    meta, content = site.meta(first), site.content(first)
    for other in others:
        found = site.meta(other)

        assert (found.tip, found.seq, found.frame_id, found.walk) == (meta.tip, meta.seq, meta.frame_id, meta.walk)
        assert site.content(other) == content


def check(site: Site, node: str, entry: dict[str, Any]) -> str:
    """A node holds the expected set, by its own content, and has proven it. Returns its root."""
    found = site.muhash(node)
    amount_sat = sum(
        coins.decode(value).amount_sat
        for storage_key, stored in site.content(node).items()
        for _, value in UTXO.items(storage_key, stored)
    )
    claimed = {"height": entry["height"]} if "height" in entry else {}
    claimed |= {"block_hash": entry.get("tip") or entry["hash"]} if {"tip", "hash"} & entry.keys() else {}

    assert found | claimed == found
    assert (found["coins"], amount_sat, found["muhash"]) == (entry["coins"], entry["amount_sat"], entry["muhash"])
    assert found["proof"] == "proven"

    return str(found["root"])
