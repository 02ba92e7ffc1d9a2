from __future__ import annotations

import types
from typing import Any, cast

import pytest

from runner import config, errors
from runner.experiment.artifacts import Artifacts, _single_file
from runner.experiment.workspace import Workspace
from runner.request.model import Artifact, Request
from runner.storage.registry import Stores


def test_a_lone_file_is_stored_as_it_is_and_never_through_a_link(tmp_path):
    """A workload that runs may put a link in its place whenever it likes; the daemon may read more than it may."""
    place = tmp_path / "place"
    place.mkdir()
    assert _single_file(place) is None
    (place / "one").write_bytes(b"own")
    single = _single_file(place)
    assert single is not None
    with single:
        assert single.read() == b"own"
    (tmp_path / "linked").symlink_to(place)
    assert _single_file(tmp_path / "linked") is None
    (place / "two").touch()
    assert _single_file(place) is None
    (place / "two").unlink()
    (place / "one").rename(tmp_path / "secret")
    (place / "one").symlink_to(tmp_path / "secret")
    assert _single_file(place) is None


@pytest.mark.parametrize("depth", [0, 1])
async def test_results_are_not_looked_for_behind_a_link_in_the_place_of_a_directory_above_them(
    tmp_path, depth
):
    """In a container a workload may be the daemon's user: what it cannot read itself it could have stored for it."""
    host = tmp_path / "host"
    workspace = Workspace.create(tmp_path / "runs", "key")
    tag = workspace.artifact("ssh")
    tag.mkdir()
    (tag / "model").write_text("trained")
    tools = types.SimpleNamespace(
        config=types.SimpleNamespace(s3=config.S3(), runs=config.Runs()),
        stores=Stores(config.S3()),
        metrics=types.SimpleNamespace(uploaded=lambda _: None),
    )
    stored = tmp_path / "store" / "ssh.tar"
    artifact = Artifact(tag="ssh", mutable=True, qualified=f"file://{stored}", key="ssh.tar")
    artifacts = Artifacts(Request(key="key", artifacts=(artifact,)), workspace, cast("Any", tools))
    artifacts.locate()
    assert await artifacts.upload() == []
    assert b"trained" in stored.read_bytes()
    replaced = tag.parents[depth]
    (host / tag.relative_to(replaced)).mkdir(parents=True)
    (host / tag.relative_to(replaced) / "key").write_text("secret")
    replaced.rename(tmp_path / "aside")
    replaced.symlink_to(host)
    (failed,) = await artifacts.upload()
    assert isinstance(failed, errors.DiskFailed)
    assert b"secret" not in stored.read_bytes()
