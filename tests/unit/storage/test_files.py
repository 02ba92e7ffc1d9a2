from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.storage.base import Forbidden, NotFound
from runner.storage.files import FileStore

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    made = tmp_path / "outside"
    made.mkdir()
    (made / "secret").write_bytes(b"secret")
    return made


def put(store: FileStore, key: str, content: bytes) -> None:
    store.put(key, io.BytesIO(content), len(content))


def test_a_link_out_of_the_root_is_not_followed(root, outside):
    store = FileStore(root)
    (root / "file").symlink_to(outside / "secret")
    (root / "directory").symlink_to(outside)
    (root / "dots").symlink_to("../outside")
    for key in ("file", "directory/secret", "dots/secret"):
        with pytest.raises(Forbidden):
            store.stat(key)
    for key in ("directory/new", "directory/deep/new", "dots/secret"):
        with pytest.raises(Forbidden):
            put(store, key, b"x")
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_put_replaces_a_link_and_not_what_it_leads_to(root, outside):
    (root / "file").symlink_to(outside / "secret")
    put(FileStore(root), "file", b"new")
    assert (outside / "secret").read_bytes() == b"secret"
    assert (root / "file").read_bytes() == b"new"
    assert not (root / "file").is_symlink()


def test_a_link_within_the_root_is_followed_and_the_root_may_be_one(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    store = FileStore(tmp_path / "link")
    put(store, "a/file", b"x")
    (root / "alias").symlink_to("a/file")
    assert store.stat("alias").size == 1


def test_links_in_a_circle_are_no_object(root):
    (root / "circle").symlink_to("circle")
    with pytest.raises(NotFound):
        FileStore(root).stat("circle")


def test_a_named_pipe_is_no_object_and_waits_for_nobody(root):
    os.mkfifo(root / "pipe")
    with pytest.raises(NotFound):
        FileStore(root).stat("pipe")
    assert list(FileStore(root).list("")) == []


def test_the_etag_changes_with_every_write(root):
    store = FileStore(root)
    etags = []
    for content in (b"a", b"b", b"b"):
        put(store, "k", content)
        etags.append(store.stat("k").etag)
    os.utime(root / "k", ns=(0, 0))
    etags.append(store.stat("k").etag)
    assert len(set(etags)) == 4


def test_a_failed_put_leaves_the_old_object_and_nothing_else(root):
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "a broken disk")

    store = FileStore(root)
    put(store, "k", b"old")
    with pytest.raises(errors.StorageUnavailable):
        store.put("k", Broken(), 10)
    assert [path.name for path in root.iterdir()] == ["k"]
    assert (root / "k").read_bytes() == b"old"


def test_what_is_half_written_is_not_listed(root):
    store = FileStore(root)
    names: list[str] = []

    class Looking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            names.extend(path.name for path in root.iterdir())
            assert list(store.list("")) == []
            return super().read(size)

    store.put("k", Looking(b"content"), 7)
    assert names
    assert names[0] != "k"
    assert [found.key for found in store.list("")] == ["k"]


def test_a_file_that_shrinks_while_it_is_read_is_not_taken_for_whole(root):
    store = FileStore(root)
    put(store, "k", bytes(10_000_000))
    with store.open("k") as stream:
        stream.read(10)
        os.truncate(root / "k", 1_000_000)
        with pytest.raises(errors.StorageUnavailable):
            list(iter(lambda: stream.read(1 << 20), b""))


def test_a_file_that_grows_while_it_is_read_ends_where_it_ended(root):
    store = FileStore(root)
    put(store, "k", b"content")
    with store.open("k") as stream, (root / "k").open("ab") as file:
        file.write(b" and more")
        file.flush()
        assert stream.read() == b"content"


@pytest.mark.parametrize("key", ["file/below", "file/below/deeper", "directory"])
def test_something_in_the_way_of_a_put_is_told(root, key):
    store = FileStore(root)
    put(store, "file", b"x")
    put(store, "directory/file", b"x")
    with pytest.raises(errors.ArtifactFailed, match="cannot be written"):
        put(store, key, b"y")


def test_unreadable_is_forbidden_and_not_away(root):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    put(FileStore(root), "k", b"x")
    (root / "k").chmod(0)
    with pytest.raises(Forbidden):
        FileStore(root).stat("k")


def test_a_listing_prunes_what_the_prefix_excludes(root):
    store = FileStore(root)
    for key in ("a/1", "a/b/2", "ab/3", "b/4"):
        put(store, key, b"")
    (root / "b").rename(root / "b2")
    assert [found.key for found in store.list("a/b")] == ["a/b/2"]
    assert [found.key for found in store.list("a")] == ["a/1", "a/b/2", "ab/3"]
    assert [found.key for found in store.list("a/b/")] == ["a/b/2"]
