from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile

import pytest

from runner import errors
from runner.executors import docker_archive

MANIFEST = [{"Config": "c.json", "RepoTags": ["python:3.11", "victim:1"], "Layers": ["l/layer.tar"]}]


def saved(tmp_path, members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("other/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../l/layer.tar"
        tar.addfile(link)
    file = tmp_path / "image.tar"
    file.write_bytes(packed.getvalue())
    return file


def renamed(tmp_path, members, *, compress=False, max_bytes=sys.maxsize):
    source, target = saved(tmp_path, members), tmp_path / "copy.tar"
    if compress:
        source.write_bytes(gzip.compress(source.read_bytes()))
    docker_archive.rename(source, target, "ours:1", max_bytes=max_bytes)
    with tarfile.open(target) as tar:
        return {
            member.name: file.read()
            if (file := tar.extractfile(member)) and member.isreg()
            else member.linkname
            for member in tar
        }


@pytest.mark.parametrize("compress", [False, True])
def test_its_own_names_are_gone_and_all_else_is_there(tmp_path, compress):
    members = {
        "l/layer.tar": b"x" * 5000,
        "c.json": {},
        "repositories": {"victim": {"1": "x"}},
        "./manifest.json": MANIFEST,
    }
    members["index.json"] = {
        "manifests": [{"digest": "d", "annotations": {"io.containerd.image.name": "victim:1"}}]
    }
    copy = renamed(tmp_path, members, compress=compress)
    assert "victim" not in repr(copy)
    assert json.loads(copy["./manifest.json"]) == [MANIFEST[0] | {"RepoTags": ["ours:1"]}]
    assert (
        json.loads(copy["index.json"])["manifests"][0]["annotations"]["io.containerd.image.name"] == "ours:1"
    )
    assert copy["l/layer.tar"] == b"x" * 5000
    assert set(copy) == {"l/layer.tar", "c.json", "./manifest.json", "index.json", "other/layer.tar"}


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"etc/passwd": b"a root file system"},
        {"manifest.json": MANIFEST * 2},
        {"manifest.json": []},
        {"manifest.json": b"no json"},
        {"manifest.json": {"a": 1}},
        {"manifest.json": ["x"]},
        {"manifest.json": b" " * (9 << 20)},
    ],
)
def test_what_is_no_image_is_refused(tmp_path, members):
    with pytest.raises(errors.ArchiveRefused, match="no archive that `docker save` writes"):
        renamed(tmp_path, members)


def test_damage_and_size_are_refused(tmp_path):
    with pytest.raises(errors.ArchiveRefused, match="larger than the disk"):
        renamed(tmp_path, {"manifest.json": MANIFEST, "l": b"x" * 5000}, max_bytes=4000)
    for content in (b"", b"nonsense", gzip.compress(b"x" * 10000)[:-20]):
        file = tmp_path / "broken"
        file.write_bytes(content)
        with pytest.raises(errors.ArchiveRefused):
            docker_archive.rename(file, tmp_path / "copy", "ours:1", max_bytes=1 << 30)


def test_its_name_is_its_content(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    assert docker_archive.name_of(one) != docker_archive.name_of(other)
    assert docker_archive.name_of(one).startswith("localhost/studio-runner-loaded:")
