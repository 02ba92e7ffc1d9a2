from __future__ import annotations

import os
import stat

from runner.experiment.workspace import Workspace, spread


def test_artifacts_are_siblings_of_the_workspace_and_nobody_else_may_look(tmp_path):
    workspace = Workspace.create(tmp_path / "runs", "key")
    assert workspace.artifact("modeldir").parent == workspace.workspace.parent
    assert stat.S_IMODE(workspace.root.stat().st_mode) == 0o700


def test_the_same_key_twice_gets_two_directories(tmp_path):
    first, second = (Workspace.create(tmp_path, "key") for _ in range(2))
    assert first.root != second.root
    assert first.run_id.split(".")[0] == second.run_id.split(".")[0]


def test_a_key_never_becomes_a_path(tmp_path):
    workspace = Workspace.create(tmp_path / "runs", "../../etc/\x00\ud800")
    assert workspace.root.parent == tmp_path / "runs"


def test_remove_takes_also_what_the_workload_has_protected(tmp_path):
    workspace = Workspace.create(tmp_path, "key")
    (workspace.workspace / "d").mkdir()
    (workspace.workspace / "d" / "f").write_text("x")
    (workspace.workspace / "d").chmod(0o500)
    workspace.remove()
    assert not workspace.root.exists()


def test_a_tree_is_removed_whole_and_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    workspace = Workspace.create(tmp_path / "runs", "key")
    (workspace.workspace / "link").symlink_to(outside)
    (workspace.workspace / "deep" / "er").mkdir(parents=True)
    (workspace.workspace / "deep" / "er" / "file").touch()
    workspace.remove()
    assert not workspace.root.exists()
    assert (outside / "precious").exists()


def test_a_tree_that_is_deeper_than_paths_and_calls_go_is_removed(tmp_path):
    workspace = Workspace.create(tmp_path, "key")
    top = os.open(workspace.workspace, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d" * 20, dir_fd=top)
        inner = os.open("d" * 20, os.O_RDONLY, dir_fd=top)
        os.close(top)
        top = inner
    os.close(os.open("f", os.O_CREAT, dir_fd=top))
    os.close(top)
    workspace.remove()
    assert not workspace.root.exists()


def test_a_directory_is_spread_where_that_can_be(tmp_path):
    spread(tmp_path)
    spread(tmp_path)
    assert Workspace.create(tmp_path, "key").root.is_dir()
