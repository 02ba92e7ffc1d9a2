"""The directories of a daemon are its own (DESIGN.md 5.9)."""

from __future__ import annotations

import os

import pytest

from runner import errors
from runner.daemon import lock
from runner.daemon.service import private_directory


def test_a_new_directory_is_for_nobody_else(tmp_path):
    assert private_directory(tmp_path / "a" / "b", "--state-dir").stat().st_mode & 0o777 == 0o700


def test_a_link_of_ones_own_is_as_good_as_a_directory(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert private_directory(tmp_path / "link", "--state-dir") == tmp_path / "link"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to others")
def test_what_others_have_put_there_is_not_used(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "precious")
    os.lchown(tmp_path / "runs", 12345, 12345)
    with pytest.raises(errors.UsageError, match="belongs to user 12345"):
        private_directory(tmp_path / "runs", "--working-dir")


def test_a_state_directory_is_one_daemons_as_well(tmp_path):
    with (
        lock.held(tmp_path, "--state-dir"),
        pytest.raises(errors.UsageError, match=f"--state-dir .*process {os.getpid()}"),
        lock.held(tmp_path, "--state-dir"),
    ):
        pass
