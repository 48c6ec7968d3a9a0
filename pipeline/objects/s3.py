"""The object store as a bucket behind the S3 API: `s3://bucket/prefix`.

Who may use it and where it is, the client reads as others do: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL` (any server that speaks S3), or what a machine's or container's
role gives.

An object is created by one conditional request (`If-None-Match: *`), never by a multipart upload, so that exactly one
of two writers wins. A server must know that condition: AWS, MinIO, Ceph and versitygw do. When the answer of a create
is lost, or was cut off by a server that had seen enough, what stands there is compared with what was to be put.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from pipeline.errors import ObjectsDenied, ObjectsUnavailable
from pipeline.objects.base import (
    ObjectInfo,
    already_there,
    check_name,
    check_range,
    folder_of,
    not_found,
)
from pipeline.objects.files import written_whole

_RETRIES_MAX = 3
_RETRY_TIMEOUT_S = 10.0
"""What the client itself tries again: a busy server, and a broken line where nothing can have been written."""
_PAUSES_S = (0.1, 0.4, 1.6)
"""Between the tries of a whole request, for what the client gives up on: an answer that is cut off."""
_REQUEST_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
_FETCH_BYTES = 4 << 20
_SAID_CHARACTERS_MAX = 300
_NO_BUCKET = "NoSuchBucket"
_BEHIND_THE_END = "416 Range Not Satisfiable"
_REASON = re.compile(r'"((?:dns|tcp connect) error)"')

Result = TypeVar("Result")


class S3Objects:
    """Keeps the promises of `ObjectStore` in a bucket, which must exist, below a prefix.

    * A request is tried again when the server is busy or the line breaks, for less than a minute.
    * Memory: an object that is put is held whole (segments and parts have bounds); of one that is fetched to a file,
      a few chunks of 4 MiB.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self._place = f"s3://{bucket}/{prefix}".rstrip("/")
        with self._trouble(""):
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                client_options={
                    "allow_http": True,  # where somebody names an endpoint of this kind; there is none by itself
                    "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
                    "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
                },
                retry_config={"max_retries": _RETRIES_MAX, "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S)},
            )

    def get(self, name: str) -> bytes:
        with self._trouble(check_name(name)):
            return _persist(lambda: bytes(obstore.get(self._store, name).bytes()))

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        check_range(start, stop)
        if start == stop:
            self.size(name)
            return b""
        with self._trouble(check_name(name)):
            try:
                return _persist(lambda: bytes(obstore.get_range(self._store, name, start=start, end=stop)))
            except GenericError as error:
                if _BEHIND_THE_END in str(error):
                    return b""
                raise

    def size(self, name: str) -> int:
        with self._trouble(check_name(name)):
            return _persist(lambda: int(obstore.head(self._store, name)["size"]))

    def modified_s(self, name: str) -> float:
        with self._trouble(check_name(name)):
            return _persist(lambda: float(obstore.head(self._store, name)["last_modified"].timestamp()))

    def put_new(self, name: str, data: bytes) -> None:
        with self._trouble(check_name(name)):
            _persist(lambda: self._create(name, data))

    def put_file_new(self, name: str, path: Path) -> None:
        self.put_new(check_name(name), path.read_bytes())

    def fetch_to(self, name: str, path: Path) -> None:
        with self._trouble(check_name(name)), written_whole(path) as draft:
            _persist(lambda: self._download(name, draft))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = folder_of(prefix)
        with self._trouble(prefix):
            found = _persist(lambda: self._list_folder(folder))
        return iter(sorted(info for info in found if info.name.startswith(prefix)))

    def delete(self, name: str) -> None:
        with self._trouble(check_name(name)), suppress(FileNotFoundError):
            _persist(lambda: obstore.delete(self._store, name))

    def _create(self, name: str, data: bytes) -> None:
        try:
            obstore.put(self._store, name, data, mode="create")
        except AlreadyExistsError:
            raise already_there(name, self._place) from None
        except BaseError:
            self._compare(name, data)

    def _download(self, name: str, path: Path) -> None:
        with path.open("wb") as file:
            for chunk in obstore.get(self._store, name).stream(min_chunk_size=_FETCH_BYTES):
                file.write(chunk)

    def _list_folder(self, folder: str) -> Sequence[ObjectInfo]:
        pages = obstore.list(self._store, prefix=folder or None)
        return [ObjectInfo(entry["path"], entry["size"]) for page in pages for entry in page]

    def _compare(self, name: str, data: bytes) -> None:
        """After a create that failed somehow: it is done if what stands there is what was to be put. Raises
        AlreadyThere if something else does, else the error that is being handled."""
        found = None
        with suppress(FileNotFoundError):
            found = bytes(obstore.get(self._store, name).bytes())
        if found is None:
            raise  # noqa: PLE0704
        if found != data:
            raise already_there(name, self._place) from None

    @contextmanager
    def _trouble(self, name: str) -> Iterator[None]:
        """The client's errors as ours."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise ObjectsDenied(
                f"the object store refuses what this user asks for: {_said(error)}",
                where=self._place,
                way_out="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and what the bucket grants",
            ) from error
        except (FileNotFoundError, BaseError) as error:
            if _NO_BUCKET in str(error):
                raise ObjectsUnavailable(
                    "the bucket does not exist", where=self._place, way_out="create it, or check --objects"
                ) from error
            if isinstance(error, FileNotFoundError):
                raise not_found(name, self._place) from error
            raise ObjectsUnavailable(
                f"the object store cannot be used: {_said(error)}",
                where=self._place,
                way_out="check AWS_ENDPOINT_URL and AWS_REGION, and whether the server is up; then try again",
            ) from error


def _persist(request: Callable[[], Result]) -> Result:
    """Ask again when an answer did not come, or not whole. Raises what the last try raises."""
    for pause_s in _PAUSES_S:
        try:
            return request()
        except GenericError as error:
            if _BEHIND_THE_END in str(error) or _NO_BUCKET in str(error):
                raise
            time.sleep(pause_s)
    return request()


def _said(error: Exception) -> str:
    """What the client says in a line, without its debugging output."""
    text, _, debug = str(error).partition("\n\nDebug source")
    reason = _REASON.search(debug)
    line = " ".join(text.split())[:_SAID_CHARACTERS_MAX]
    return f"{line} ({reason[1]})" if reason else line
