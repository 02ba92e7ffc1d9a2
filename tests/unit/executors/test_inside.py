"""The scripts that containers begin with, run by real shells."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner import errors
from runner.executors.inside import NO_PYTHON, Inside

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
SHOW = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))"


def run(folder, env, *words, shell="sh"):
    inside = Inside(folder, folder / "env", env)
    inside.program.unlink(missing_ok=True)
    inside.installer.unlink(missing_ok=True)
    inside.started.unlink(missing_ok=True)
    inside.write()
    argv = [*(["busybox", "sh"] if shell == "busybox" else [shell]), str(inside.program), *words]
    given_env = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": "/engine"}
    ended = subprocess.run(argv, env=given_env, capture_output=True, check=False)
    return inside, ended


@pytest.mark.parametrize("shell", SHELLS)
def test_variables_and_arguments_arrive_as_they_are(tmp_path, shell):
    env = {
        "QUOTES": "a'b\"c `id` $(id) ${HOME} \\ \n\n",
        "EMPTY": "",
        "BYTES": b"\xff\xfe".decode("utf-8", "surrogateescape"),
        "LC_ALL": "xx_YY.none",
        "IFS": "x",
        "OPTIND": "none",
        "EUID": "0",
        "a-b": "x",
    }
    inside, ended = run(tmp_path, env, sys.executable, "-c", SHOW, "a b", "$(id)", "'", shell=shell)
    assert ended.stderr == b""
    seen, argv = json.loads(ended.stdout)
    passed = {name: env[name] for name in ("QUOTES", "EMPTY", "BYTES", "LC_ALL")}
    assert {name: seen[name] for name in passed} == passed
    assert argv == ["a b", "$(id)", "'"]
    assert inside.left_out == ("IFS", "OPTIND", "EUID", "a-b")
    assert inside.started.exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_program_that_dies_is_told_by_its_code_alone(tmp_path, shell):
    words = (sys.executable, "-c", "import os, sys; print('last', file=sys.stderr, flush=True); os.abort()")
    _, ended = run(tmp_path, {}, *words, shell=shell)
    assert (ended.returncode, ended.stdout, ended.stderr) == (134, b"", b"last\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_outlives_a_term_and_the_program_gets_the_default(tmp_path, shell):
    script = (
        "import os, signal; os.kill(os.getppid(), 15); print(signal.getsignal(15) is signal.SIG_DFL); exit(3)"
    )
    _, ended = run(tmp_path, {}, sys.executable, "-c", script, shell=shell)
    assert (ended.returncode, ended.stdout) == (3, b"True\n")


def test_a_program_s_library_path_goes_before_the_engine_s(tmp_path):
    _, ended = run(tmp_path, {"LD_LIBRARY_PATH": "/mine"}, sys.executable, "-c", SHOW)
    assert json.loads(ended.stdout)[0]["LD_LIBRARY_PATH"] == "/mine:/engine"


def test_nobody_else_can_read_them(tmp_path):
    inside, _ = run(tmp_path, {"SECRET": "x"}, "true")
    assert inside.program.stat().st_mode & 0o777 == 0o600
    assert inside.installer.stat().st_mode & 0o777 == 0o600


def test_without_python_nothing_has_started(tmp_path):
    inside, ended = run(tmp_path, {"PATH": str(tmp_path)}, "python", "x.py")
    assert ended.returncode == NO_PYTHON
    assert not inside.started.exists()


def test_a_nul_is_refused(tmp_path):
    with pytest.raises(errors.UnsupportedRequest, match="NUL"):
        run(tmp_path, {"X": "a\0b"}, "true")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_any_value(tmp_path, value):
    _, ended = run(tmp_path, {"VALUE": value}, "printenv", "VALUE")
    assert ended.stdout.decode() == value + "\n"
