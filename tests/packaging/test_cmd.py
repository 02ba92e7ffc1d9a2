"""cmd/ holds programs, not a package: a package of that name would hide the standard library's, and break pdb and pytest."""

from __future__ import annotations

import cmd
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.name for path in (ROOT / "cmd").iterdir() if path.is_dir() and path.name != "__pycache__"
)


def test_the_standard_librarys_cmd_is_not_hidden():
    assert hasattr(cmd, "Cmd")
    done = subprocess.run(
        [sys.executable, "-c", "import cmd, pdb; assert cmd.Cmd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_only_programs():
    files = {path.relative_to(ROOT / "cmd") for path in (ROOT / "cmd").rglob("*.py")}
    assert files == {Path(name) / "__main__.py" for name in PROGRAMS}


def test_each_program_is_a_script_of_the_distribution():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(name.replace("-", "_") for name in scripts) == PROGRAMS


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_shows_its_help(name, tmp_path):
    done = subprocess.run(
        [sys.executable, f"cmd/{name}", "--help"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_has_logic(name):
    lines = [line for line in (ROOT / "cmd" / name / "__main__.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 5
