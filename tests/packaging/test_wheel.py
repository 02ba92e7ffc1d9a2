"""What is installed: the package, its metadata and two programs, and nothing else."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.packaging.documents import ROOT

UV = Path(sys.executable).with_name("uv")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the source distribution, and the wheel that was made from it."""
    directory = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [str(UV), "build", "--quiet", "--out-dir", str(directory), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"runner", f"studio_runner-{PROJECT['version']}.dist-info"}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "runner"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    sources = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
    assert {name for name in wheel.namelist() if name.startswith("runner/")} == sources


def test_its_programs_are_those_of_the_project(wheel):
    text = wheel.read(f"studio_runner-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    points = configparser.ConfigParser()
    points.read_string(text)
    assert dict(points["console_scripts"]) == PROJECT["scripts"]


def test_its_metadata_has_the_licence_the_readme_and_the_dependencies(wheel):
    info = f"studio_runner-{PROJECT['version']}.dist-info"
    metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "# studio-runner" in str(metadata.get_payload())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(required) == len(PROJECT["dependencies"])


def test_the_source_distribution_has_what_a_stranger_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "runner/__main__.py"} <= names
    assert "cmd/runner/__main__.py" in names
    assert "tests/conftest.py" in names
    assert not [name for name in names if name.startswith((".venv", ".demo", ".test-venvs", "bench/results"))]
