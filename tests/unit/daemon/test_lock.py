from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from runner import errors
from runner.daemon import lock

HOLD = "import sys; from pathlib import Path; from runner.daemon import lock\nwith lock.sole_daemon(Path(sys.argv[1])):\n  print('held', flush=True); sys.stdin.read()"


def test_a_second_daemon_is_refused_by_name_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(errors.UsageError, match=f"process {holder.pid}"), lock.sole_daemon(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with lock.sole_daemon(tmp_path):
        pass


def test_clients_find_the_address_while_the_daemon_lives(tmp_path):
    with lock.sole_daemon(tmp_path):
        lock.announce(tmp_path, ("127.0.0.1", 9090))
        assert json.loads((tmp_path / lock.ADDRESS).read_text()) == {
            "address": "127.0.0.1:9090",
            "pid": os.getpid(),
        }
    assert not (tmp_path / lock.ADDRESS).exists()


def test_a_directory_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UsageError, match="--working-dir"), lock.sole_daemon(tmp_path / "file"):
        pass
