"""Every error stateferry raises on purpose, and the exit code a command ends with when it meets one.

    StateferryError                     1  failed
    ├── SnapshotCancelled                  somebody ended it, or it took too long
    ├── UsageError                      2  the request itself is wrong
    │   ├── BrokerUrlError                 a broker URL that cannot be read
    │   ├── NotEmpty                       a restore into a directory that holds something
    │   ├── SchemaUnknown                  a table that this chain does not have
    │   ├── SecretUnusable                 a file of a password, key or certificate that cannot be used
    │   └── SettingsConflict               a setting differs from what the generation or directory fixed
    ├── Diverged                        3  a root, an id or an audit is not what it must be; quarantine
    │   ├── RootMismatch                   the root computed is not the root claimed
    │   ├── FrameIdMismatch                a frame's content does not have the id it claims
    │   ├── SeqConflict                    another frame id at a seq already applied
    │   ├── ApplyConflict                  a frame changes a key that is not as the frame says
    │   ├── ArchiveConflict                another segment stands where this node's would go
    │   ├── AuditFailed                    what the store holds does not sum up to its vectors
    │   └── Quarantined                    the directory was quarantined before; commands show the evidence
    ├── Gap                             4  something in between is missing
    │   ├── SeqGap                         frames are missing
    │   ├── WalkGap                        events are missing
    │   ├── LogLost                        the log is shorter than, or not the one, the store followed
    │   │   └── LogChanged                 noticed while following: beginning again takes back what it lost
    │   └── OffsetOutOfRange               the log no longer, or not yet, holds that offset
    ├── CorruptInput                    5  bytes from outside are not what they say
    │   ├── BlockCorrupt                   a block file: truncated, garbage, wrong merkle root
    │   ├── BlockOrphan                    a block whose parent is unknown
    │   ├── BlockInvalid                   a double spend, a spend of nothing, a coin created twice
    │   ├── CoinsCorrupt                   a base-coins file that cannot be read
    │   ├── EventCorrupt                   an event that cannot be decoded
    │   ├── WalkInvalid                    an event that does not follow from the position
    │   ├── FrameCorrupt                   a frame, or an archived frame, that cannot be decoded
    │   ├── SegmentCorrupt                 an archive segment
    │   ├── RangeCorrupt                   a range diff of the archive, or what it is to be made of
    │   ├── PartCorrupt                    a snapshot part
    │   ├── ManifestCorrupt                a manifest
    │   ├── SignatureMissing               a manifest that is not signed, and has to be
    │   ├── SignatureWrong                 a manifest that another one signed, or nobody
    │   ├── LeaseCorrupt                   an intent, a pin or a mark
    │   ├── StoreCorrupt                   a store's own records
    │   └── LogCorrupt                     the embedded log's file
    ├── WrongChain                      6  bytes of another chain or generation
    │   └── GenerationEnded                this node's generation is not the one in force
    ├── Fenced                          7  another writer is in force
    ├── Unsupported                     8  a version or a required feature this build does not know
    ├── Locked                          9  somebody else owns the directory or the log
    ├── DiskFull                       10  no space, or no permission to use it
    ├── RewindTooDeep                  11  a rewind below the final height
    ├── NotProven                      12  a read of a state that this node has not proven
    ├── NotFound                       13  a key, snapshot, manifest, height or object that is not there
    │   └── ObjectMissing                  an object that is not in the object store, any more or at all
    ├── BrokerUnavailable              14  no broker answers, or it could not do what was asked
    ├── Different                      17  what was compared is not the same
    └── AccessDenied                   15  a broker and this node do not accept each other
        ├── WrongListener                  the port is of a listener with another security protocol
        ├── BrokerUntrusted                the broker's certificate is none to trust
        ├── LoginRefused                   the broker refuses this client's certificate, or its name and password
        └── NotAuthorized                  this user may not do what was asked: an ACL is missing

Fields first; the sentence is made in ``__str__`` and says what, where, and the way out.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class StateferryError(Exception):
    """Base of all. ``what`` names the thing, ``where`` the place, ``way_out`` what the reader can do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", way_out: str = "") -> None:
        super().__init__(what, where, way_out)
        self.what = what
        self.where = where
        self.way_out = way_out

    @property
    def name(self) -> str:
        """The error's stable name, as printed by commands and logs."""
        return type(self).__name__

    @property
    def document(self) -> dict[str, str | int]:
        """The error as commands print it with --json."""
        return {
            "error": self.name,
            "exit_code": self.exit_code,
            "message": self.what,
            "where": self.where,
            "way_out": self.way_out,
        }

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        way_out = f"; {self.way_out}" if self.way_out else ""
        return f"{self.what}{where}{way_out}"


class SnapshotCancelled(StateferryError):
    pass


class UsageError(StateferryError):
    exit_code = 2


class BrokerUrlError(UsageError):
    pass


class NotEmpty(UsageError):
    pass


class SchemaUnknown(UsageError):
    pass


class SecretUnusable(UsageError):
    pass


class SettingsConflict(UsageError):
    pass


class Diverged(StateferryError):
    exit_code = 3


class RootMismatch(Diverged):
    pass


class FrameIdMismatch(Diverged):
    pass


class SeqConflict(Diverged):
    pass


class ApplyConflict(Diverged):
    pass


class ArchiveConflict(Diverged):
    pass


class AuditFailed(Diverged):
    pass


class Quarantined(Diverged):
    pass


class Gap(StateferryError):
    exit_code = 4


class SeqGap(Gap):
    pass


class WalkGap(Gap):
    pass


class LogLost(Gap):
    pass


class LogChanged(LogLost):
    pass


class OffsetOutOfRange(Gap):
    pass


class CorruptInput(StateferryError):
    exit_code = 5


class BlockCorrupt(CorruptInput):
    pass


class BlockOrphan(CorruptInput):
    pass


class BlockInvalid(CorruptInput):
    pass


class CoinsCorrupt(CorruptInput):
    pass


class EventCorrupt(CorruptInput):
    pass


class WalkInvalid(CorruptInput):
    pass


class FrameCorrupt(CorruptInput):
    pass


class SegmentCorrupt(CorruptInput):
    pass


class RangeCorrupt(CorruptInput):
    pass


class PartCorrupt(CorruptInput):
    pass


class ManifestCorrupt(CorruptInput):
    pass


class SignatureMissing(CorruptInput):
    pass


class SignatureWrong(CorruptInput):
    pass


class LeaseCorrupt(CorruptInput):
    pass


class StoreCorrupt(CorruptInput):
    pass


class LogCorrupt(CorruptInput):
    pass


class WrongChain(StateferryError):
    exit_code = 6


class GenerationEnded(WrongChain):
    pass


class Fenced(StateferryError):
    exit_code = 7


class Unsupported(StateferryError):
    exit_code = 8


class Locked(StateferryError):
    exit_code = 9


class DiskFull(StateferryError):
    exit_code = 10


class RewindTooDeep(StateferryError):
    exit_code = 11


class NotProven(StateferryError):
    exit_code = 12


class NotFound(StateferryError):
    exit_code = 13


class ObjectMissing(NotFound):
    pass


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
"""What an operating system says when it has no space for a file, or no permission to write it."""


def disk_full(error: OSError) -> DiskFull | None:
    """What an error of the operating system means where files are written; None: something else."""
    if error.errno not in NO_ROOM:
        return None
    where = error.filename2 or error.filename or ""
    return DiskFull(
        f"a file cannot be written: {error.strerror}",
        where=str(where),
        way_out="free space, or give this user permission, and start again",
    )


class BrokerUnavailable(StateferryError):
    exit_code = 14


class AccessDenied(StateferryError):
    exit_code = 15


class WrongListener(AccessDenied):
    pass


class BrokerUntrusted(AccessDenied):
    pass


class LoginRefused(AccessDenied):
    pass


class NotAuthorized(AccessDenied):
    pass


class ObjectsDenied(AccessDenied):
    pass


class ObjectsUnavailable(StateferryError):
    exit_code = 16


class Different(StateferryError):
    exit_code = 17
