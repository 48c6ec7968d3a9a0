"""One suite over all object stores: what `pipeline.objects.base` promises, promise by promise."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import DiskFull, NotFound, ObjectsUnavailable, UsageError
from pipeline.objects import AlreadyThere, LocalObjects, MemoryObjects, ObjectInfo, ObjectStore, open_objects
from pipeline.objects import local as local_module
from tests.faulty_s3 import FAULTS, faulty


@pytest.fixture(params=["memory", "local", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    match request.param:
        case "memory":
            return MemoryObjects(time.time)
        case "local":
            return LocalObjects(tmp_path / "objects")
        case _:
            return open_objects(request.getfixturevalue("s3_url"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def names(objects: ObjectStore, prefix: str = "") -> list[str]:
    return [info.name for info in objects.list(prefix)]


@pytest.mark.parametrize("data", [b"", b"x", bytes(3 << 20)])
def test_what_was_put_comes_back(objects: ObjectStore, data: bytes) -> None:
    """Whole, its size, and every range, also beyond the end."""
    objects.put_new("a/b/c.bin", data)

    assert objects.get("a/b/c.bin") == data
    assert objects.size("a/b/c.bin") == len(data)
    assert objects.get_range("a/b/c.bin", 0, 1) == data[:1]
    assert objects.get_range("a/b/c.bin", 1, 1 << 30) == data[1:]
    assert objects.get_range("a/b/c.bin", 1 << 30, 1 << 31) == b""


def test_a_name_gets_its_bytes_once(objects: ObjectStore, tmp_path: Path) -> None:
    """The second writer is told, the first one's bytes stay."""
    objects.put_new("a", b"first")
    other = tmp_path / "other"
    other.write_bytes(b"second")
    with pytest.raises(AlreadyThere):
        objects.put_new("a", b"second")
    with pytest.raises(AlreadyThere):
        objects.put_file_new("a", other)

    assert objects.get("a") == b"first"
    assert names(objects) == ["a"]


def test_when_an_object_was_put(objects: ObjectStore) -> None:
    """The store's clock says it, in seconds since 1970."""
    before = time.time()
    objects.put_new("a", b"first")

    assert before - 2 <= objects.modified_s("a") <= time.time() + 2
    with pytest.raises(NotFound):
        objects.modified_s("b")


def test_exactly_one_of_many_writers_wins(objects: ObjectStore) -> None:
    """Threads that put one name at one time: one returns, the others get AlreadyThere, the bytes are the winner's."""
    won: list[bytes] = []
    lost: list[bytes] = []
    barrier = threading.Barrier(8)

    def write(data: bytes) -> None:
        barrier.wait()
        try:
            objects.put_new("deep/name", data)
        except AlreadyThere:
            lost.append(data)
        else:
            won.append(data)

    threads = [threading.Thread(target=write, args=(bytes([number]) * 10_000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert len(lost) == 7
    assert objects.get("deep/name") == won[0]


def test_files_go_in_and_out(objects: ObjectStore, tmp_path: Path) -> None:
    """The file put stays where it is; the file fetched replaces what was there."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    target.write_bytes(b"something longer that was there")
    objects.put_file_new("part", source)
    source.write_bytes(b"changed")
    objects.fetch_to("part", target)

    assert target.read_bytes() == objects.get("part") == b"content"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_listing_is_by_name_and_prefix(objects: ObjectStore) -> None:
    """A prefix is any string; names come in order, with sizes."""
    for name in ["b/2", "b/10", "b/1/x", "bb", "a", "c/d/e"]:
        objects.put_new(name, name.encode())

    assert names(objects) == ["a", "b/1/x", "b/10", "b/2", "bb", "c/d/e"]
    assert names(objects, "b") == ["b/1/x", "b/10", "b/2", "bb"]
    assert names(objects, "b/") == ["b/1/x", "b/10", "b/2"]
    assert names(objects, "b/1") == ["b/1/x", "b/10"]
    assert names(objects, "nothing/here") == []
    assert list(objects.list("c")) == [ObjectInfo("c/d/e", 5)]


def test_an_empty_store_lists_nothing(objects: ObjectStore) -> None:
    """Nothing was put: nothing is there, and that is no error."""
    assert names(objects) == []


@pytest.mark.parametrize("name", ["missing", "a/missing", "a", "a/b/below"])
def test_what_is_not_there_is_not_found(objects: ObjectStore, name: str, tmp_path: Path) -> None:
    """Every read says NotFound, also for a folder and below an object; a fetch leaves the target alone."""
    objects.put_new("a/b", b"x")
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    for read in (
        lambda: objects.get(name),
        lambda: objects.get_range(name, 0, 1),
        lambda: objects.size(name),
        lambda: objects.fetch_to(name, target),
    ):
        with pytest.raises(NotFound, match=name):
            read()

    assert target.read_bytes() == b"kept"


def test_deleting_is_idempotent(objects: ObjectStore) -> None:
    """Gone once, gone twice; a folder is nothing to delete; the name may be put again."""
    objects.put_new("a/b", b"x")
    for name in ["a/b", "a/b", "never", "a", "a/b/c"]:
        objects.delete(name)
    with pytest.raises(NotFound):
        objects.get("a/b")
    objects.put_new("a/b", b"y")

    assert objects.get("a/b") == b"y"


@pytest.mark.parametrize(
    "name",
    [
        *["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.new-x"],
        *["a\\b", "a b", "a\n", "a\x00", "ä", "x" * 513],
    ],
)
def test_names_that_are_none_are_refused(objects: ObjectStore, name: str, tmp_path: Path) -> None:
    """Nothing outside the store, nothing hidden, nothing strange: UsageError on every call."""
    for call in (
        lambda: objects.get(name),
        lambda: objects.get_range(name, 0, 1),
        lambda: objects.size(name),
        lambda: objects.put_new(name, b"x"),
        lambda: objects.put_file_new(name, tmp_path / "file"),
        lambda: objects.fetch_to(name, tmp_path / "file"),
        lambda: objects.delete(name),
    ):
        with pytest.raises(UsageError):
            call()
    assert names(objects) == []


@pytest.mark.parametrize("prefix", ["/", "../", "a/../b", "a//"])
def test_prefixes_that_no_name_can_have_are_refused(objects: ObjectStore, prefix: str) -> None:
    """A listing does not leave the store either."""
    with pytest.raises(UsageError):
        names(objects, prefix)


@pytest.mark.parametrize("objects", ["memory", "local"], indirect=True)
@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b", "a/b/c/d"), ("a/b/c", "a")])
def test_no_object_is_a_folder_of_another(objects: ObjectStore, first: str, second: str) -> None:
    """What a directory cannot hold, no store holds; but for a bucket, where nobody asks."""
    objects.put_new(first, b"x")
    with pytest.raises(UsageError):
        objects.put_new(second, b"y")

    assert names(objects) == [first]


def test_leftovers_of_a_crash_are_not_objects(root: Path) -> None:
    """Temporary files are neither listed nor in the way."""
    objects = LocalObjects(root)
    objects.put_new("a/b", b"x")
    (root / "a/.new-crashed").write_bytes(b"half")
    (root / ".hidden").mkdir()
    (root / ".hidden/file").write_bytes(b"")

    assert names(objects) == ["a/b"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """DiskFull, no object, no temporary file; the same call works once there is room."""
    objects = LocalObjects(root)

    def no_room(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(local_module.os, "fsync", no_room)
        with pytest.raises(DiskFull):
            objects.put_new("a", b"x")
    assert not root.exists() or list(root.iterdir()) == []
    objects.put_new("a", b"x")

    assert objects.get("a") == b"x"


def test_other_trouble_is_not_hidden(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error stays one, and nothing is published."""
    objects = LocalObjects(root)
    objects.put_new("a", b"x")

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(local_module.os, "fsync", broken)
        with pytest.raises(OSError, match="broken"):
            objects.put_new("b", b"x")

    assert names(objects) == ["a"]
    assert [path.name for path in root.iterdir()] == ["a"]


def test_objects_survive_the_store(root: Path) -> None:
    """Another opening of the directory sees them."""
    LocalObjects(root).put_new("a/b", b"x")

    assert open_objects(root.as_uri()).get("a/b") == b"x"


def test_urls(tmp_path: Path) -> None:
    """file:// with an absolute path, percent-encoded; named memory stores are shared, unnamed ones are not."""
    folder = tmp_path / "with space"
    open_objects(folder.as_uri()).put_new("a", b"x")
    open_objects("memory://shared-by-name").put_new("a", b"y")

    assert (folder / "a").read_bytes() == b"x"
    assert open_objects("memory://shared-by-name").get("a") == b"y"
    assert names(open_objects("memory://")) == []


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "gs://b", "/plain/path", "", "file://host/path", "file:relative"])
def test_other_urls_are_refused(url: str) -> None:
    """UsageError, naming what this version knows."""
    with pytest.raises(UsageError, match=r"file:///path|s3://bucket/prefix"):
        open_objects(url)


def test_a_url_with_a_query_is_refused() -> None:
    """Nothing in a URL is ignored."""
    with pytest.raises(UsageError, match="query"):
        open_objects("file:///somewhere?region=x")


# Behind a network


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("every", [2, 5])
def test_spoilt_requests_change_nothing(
    s3_url: str, fault: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every so many-th request goes wrong: what was put is there, whole and once, and what is read is that."""
    data = {f"part/{number}": bytes([number]) * (number * 40_000) for number in range(1, 6)}
    sound = open_objects(s3_url)
    with faulty(os.environ["AWS_ENDPOINT_URL"], fault, every) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        objects = open_objects(s3_url)
        for name, content in data.items():
            with suppress(AlreadyThere):  # it is, by a request whose answer was lost
                objects.put_new(name, content)
        with pytest.raises(AlreadyThere):
            objects.put_new("part/3", b"something else")
        for name, content in data.items():
            assert objects.get(name) == content
            assert objects.get_range(name, 10, 30_000) == content[10:30_000]
            objects.fetch_to(name, tmp_path / "fetched")
            assert (tmp_path / "fetched").read_bytes() == content
        assert list(objects.list()) == [ObjectInfo(name, len(content)) for name, content in sorted(data.items())]
        objects.delete("part/1")

    assert names(sound, "part/") == ["part/2", "part/3", "part/4", "part/5"] and sound.get("part/5") == data["part/5"]


def test_server_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names the place and the way out, after a bounded number of tries; no secret is in it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ObjectsUnavailable, match="tcp connect error") as caught:
        open_objects(s3_url).put_new("a", b"x")

    assert s3_url in str(caught.value) and "AWS_ENDPOINT_URL" in str(caught.value)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_bucket_that_is_not_there(s3_url: str) -> None:
    """Never taken for an empty store, or a missing object."""
    objects = open_objects("s3://nobody-made-this/x")
    for call in (lambda: objects.get("a"), lambda: objects.put_new("a", b""), objects.list):
        with pytest.raises(ObjectsUnavailable, match="bucket does not exist"):
            call()
