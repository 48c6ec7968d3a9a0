"""A node's directory: who owns it, what is in it, and what was set aside.

LOCK          held by the one worker or command that may write here
store/        the RocksDB store
shards/NN/    instead, where a generation has several shards: a folder for each, with its `store/`
control.sock  where a running worker answers
copies/       checkpoints that a running worker made for commands; each is removed by who asked for it
NODE          the node's id
refused/      events that a primary did not take, one folder each, with the reason
quarantine/   evidence of a divergence, one folder each; while one is open the store is not followed or served
renewing/     what will be the store, of the generation that followed (see `renewal`); in a shard's folder, what a
              worker restores beside its other shards (see `restoring`)
squashing/    what range diffs are made of; in a shard's folder, where there are several
rescaling/    parts for a generation with other shards, while it is made
audits/       the last result of each level of `stateferry verify`
prefetching/  what a primary's processes read ahead on; in a shard's folder, where there are several
auditing/     what such an audit needs while it runs
left-generations/    stores of generations that have ended
log.sqlite    the embedded log, where no other broker is named
objects/      the object store, where no other is named
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import DiskFull, Locked, NotFound, Quarantined, StateferryError
from pipeline.objects.files import sync, written_whole
from pipeline.stores.rocksdb import RocksStore

_EVIDENCE = "evidence.json"
_RECORD = "record.bin"
_SHARDS = "shards"


class DataDir:
    """One directory, by path. `lock` before anything is written."""

    def __init__(self, path: Path, *, owner: DataDir | None = None) -> None:
        """``owner``: the node's directory, of a shard's."""
        self.path = path.absolute()
        self._owner = owner or self
        self._lock_fd: int | None = None

    def shard(self, number: int, shards: int) -> DataDir:
        """Where a shard's store is: this directory, if there is one shard."""
        return self if shards == 1 else DataDir(self.path / _SHARDS / f"{number:02d}", owner=self)

    @property
    def shard_dirs(self) -> list[DataDir]:
        """Those of the shards that have a store, in their order; this directory, if it has the only store."""
        if (self.path / _SHARDS).exists():
            dirs = [DataDir(path, owner=self) for path in sorted((self.path / _SHARDS).iterdir())]
            return [found for found in dirs if (found.store_path / "CURRENT").exists()]
        return [self] if (self.store_path / "CURRENT").exists() else []

    @property
    def store_path(self) -> Path:
        return self.path / "store"

    @property
    def stores_path(self) -> Path:
        """The store, or the folder that holds those of all shards."""
        return self.path / _SHARDS if (self.path / _SHARDS).exists() else self.store_path

    @property
    def socket_path(self) -> Path:
        return self.path / "control.sock"

    @property
    def quarantine_path(self) -> Path:
        return self._owner.path / "quarantine"

    @property
    def copies_path(self) -> Path:
        return self._owner.path / "copies"

    @property
    def auditing_path(self) -> Path:
        return self._owner.path / "auditing"

    @property
    def node_id(self) -> str:
        """A name of this directory's node that outlives its processes: made once."""
        file = self._owner.path / "NODE"
        if not file.exists():
            draft = self._owner.path / f"NODE.{os.getpid()}"
            draft.write_text(secrets.token_hex(8))
            draft.rename(file)
        return file.read_text().strip()

    @property
    def has_store(self) -> bool:
        return bool(self.shard_dirs)

    def create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskFull(f"the data directory cannot be made: {error}", where=str(self.path)) from error

    def lock(self) -> Self:
        """Own the directory until `unlock` or the end of this process. Raises Locked, naming who has it."""
        self.create()
        fd = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(fd, 64).decode(errors="replace").strip()
            os.close(fd)
            raise Locked(
                f"another worker owns this data directory (process {owner or 'unknown'})",
                where=str(self.path),
                way_out="stop it first, or name another --data-dir",
            ) from error
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._lock_fd = fd
        return self

    def unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self.lock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unlock()

    def open_store(self) -> RocksStore:
        """The store that is here. Raises NotFound without one; Quarantined while evidence is open."""
        if not self.has_store:
            raise NotFound(
                "there is no store in this data directory",
                where=str(self.path),
                way_out="`stateferry run` follows a chain into it, `stateferry restore` fills it from a snapshot",
            )
        self._owner.check_quarantine()
        return RocksStore(self.store_path)

    def set_aside(self, error: StateferryError, record: bytes, *, topic: str, partition: int, offset: int) -> Path:
        """Keep an event that the primary refused, durably: its folder. Again at the same place is the same folder."""
        folder = self._owner.path / "refused" / f"{topic}-{partition}-{offset}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_evidence(folder, error, record, topic=topic, partition=partition, offset=offset)
        return folder

    # Audits

    def write_audit(self, level: str, result: dict[str, Any]) -> None:
        """Keep the result of an audit, in the place of the one before it."""
        folder = self._owner.path / "audits"
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / f"{level}.json") as draft:
            draft.write_text(json.dumps(result, indent=1))

    def audits(self) -> dict[str, dict[str, Any]]:
        """The last result of each level that was ever run, by level."""
        return {
            file.stem: json.loads(file.read_text()) for file in sorted((self._owner.path / "audits").glob("*.json"))
        }

    # Quarantine

    def quarantine(self, error: StateferryError, record: bytes, **facts: Any) -> Path:
        """Keep the evidence of a divergence, durably. Returns its folder."""
        folder = self.quarantine_path / secrets.token_hex(4)
        folder.mkdir(parents=True)
        _write_evidence(folder, error, record, **facts)
        return folder

    def evidence(self) -> list[dict[str, Any]]:
        """What led to quarantine, while it is open."""
        found = []
        for file in sorted(self.quarantine_path.glob(f"*/{_EVIDENCE}")):
            facts: dict[str, Any] = json.loads(file.read_text())
            record = file.parent / _RECORD
            facts |= {"folder": str(file.parent), "record_bytes": record.stat().st_size if record.exists() else 0}
            found.append(facts)
        return found

    def check_quarantine(self) -> None:
        """Raises Quarantined while evidence is open."""
        evidence = self.evidence()
        if evidence:
            raise Quarantined(
                f"this data directory is in quarantine: {evidence[0]['error']}: {evidence[0]['message']}",
                where=str(self.path),
                way_out="`stateferry quarantine` shows the evidence and the ways out",
            )


def _write_evidence(folder: Path, error: StateferryError, record: bytes, **facts: Any) -> None:
    for name, data in (
        (_RECORD, record),
        (_EVIDENCE, json.dumps({"error": error.name, "message": str(error), **facts}, indent=1).encode()),
    ):
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync(folder)
    sync(folder.parent)
