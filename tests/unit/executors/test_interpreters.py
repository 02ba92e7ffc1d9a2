from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from runner import errors
from runner.executors.interpreters import Interpreters
from runner.process.spawner import Spawner

OWN = sys.version_info[:2]


@pytest.fixture
async def spawner():
    spawner = Spawner()
    yield spawner
    await spawner.aclose()


@pytest.fixture
def machine(tmp_path, spawner):
    """Makes a machine that has these Pythons beside the one the tests run on; what they are is in the cache file."""

    def make(*versions: str, own: str | None = None) -> Interpreters:
        known = {}
        own_path = os.path.realpath(getattr(sys, "_base_executable"))  # noqa: B009 - not in the type stubs
        if own:
            known[own_path] = (Path(own_path).stat().st_mtime_ns, [int(part) for part in own.split(".")])
        for version in versions:
            path = tmp_path / "opt" / version / "bin" / f"python{version.rpartition('.')[0]}"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"\x7fELF")
            path.chmod(0o755)
            known[str(path)] = (path.stat().st_mtime_ns, [int(part) for part in version.split(".")])
        cache_file = tmp_path / "interpreters.json"
        cache_file.write_text(json.dumps(known))
        return Interpreters(
            spawner, cache_file, environ={"PATH": "", "HOME": str(tmp_path)}, places=("~/opt/*/bin",)
        )

    return make


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (None, "3.9.4"),
        ("", "3.9.4"),
        ("3", "3.9.4"),
        ("3.6", "3.6.15"),
        ("3.6.9", "3.6.9"),
        ("3.12", "3.12.1"),
        ("python3.12", "3.12.1"),
        ("3.12.*", "3.12.1"),
        ("3.1", "3.10.2"),
    ],
)
async def test_an_interpreter_is_chosen(machine, monkeypatch, wanted, given):
    monkeypatch.setattr(sys, "version_info", (3, 9, 4))
    there = machine("2.7.18", "3.6.9", "3.6.15", "3.10.2", "3.12.1", own="3.9.4")
    choice = await there.choose(wanted, fallback=False)
    assert str(choice.interpreter) == given
    assert bool(choice.warning) == (wanted == "3.1")


async def test_another_patch_is_taken_with_a_warning(machine):
    choice = await machine("3.6.9", "3.6.15").choose("3.6.10", fallback=False)
    assert str(choice.interpreter) == "3.6.15"
    assert "3.6.10" in str(choice.warning)


@pytest.mark.parametrize("wanted", ["2", "2.7", "3.4", "3.7", "4"])
async def test_what_is_not_there_is_refused_with_a_list_of_what_is(machine, wanted):
    with pytest.raises(errors.UnsupportedRequest) as caught:
        await machine("2.7.18", "3.6.9", "3.13.0").choose(wanted, fallback=False)
    text = str(caught.value)
    assert "2.7.18 (too old" in text
    assert "3.6.9" in text
    assert "3.13.0" in text
    assert "--python-fallback" in text


@pytest.mark.parametrize(
    ("wanted", "given"),
    [("2", "3.6.9"), ("3.7", "3.8.1"), ("3.14", "3.13.0"), ("3.4.1", "3.6.9"), ("4", "3.13.0")],
)
async def test_the_fallback_is_the_nearest_rather_newer(machine, wanted, given):
    there = machine("3.6.9", "3.8.1", "3.13.0", own="3.9.4")
    choice = await there.choose(wanted, fallback=True)
    assert str(choice.interpreter) == given
    assert wanted in str(choice.warning)


@pytest.mark.parametrize("wanted", ["three", "latest", "-3"])
async def test_what_is_no_version_is_refused(machine, wanted):
    with pytest.raises(errors.UnsupportedRequest):
        await machine("3.6.9").choose(wanted, fallback=True)


async def test_one_that_appears_or_vanishes_is_noticed(machine, tmp_path):
    there = machine("3.6.9", "3.6.15")
    assert str((await there.choose("3.6", fallback=False)).interpreter) == "3.6.15"
    (tmp_path / "opt/3.6.15/bin/python3.6").unlink()
    assert str((await there.choose("3.6", fallback=False)).interpreter) == "3.6.9"
    (tmp_path / "opt/3.6.9/bin/python3.6").unlink()
    with pytest.raises(errors.UnsupportedRequest):
        await there.choose("3.6", fallback=False)


async def test_real_ones_are_asked_and_shims_and_copies_are_passed_over(spawner, tmp_path):
    binary = Path(os.path.realpath(sys.executable))
    shims, copy, links, broken = (tmp_path / name for name in ("shims", "venv/bin", "links", "broken"))
    for folder in (shims, copy, links, broken):
        folder.mkdir(parents=True)
    (shims / "python3").write_text(f'#!/bin/sh\nexec {binary} "$@"\n')
    (copy.parent / "pyvenv.cfg").write_text("")
    (copy / "python3").write_bytes(binary.read_bytes())
    (links / "python3.99").symlink_to(binary)
    (broken / "python3.8").write_bytes(b"\x7fELF")
    for path in (shims / "python3", copy / "python3", broken / "python3.8"):
        path.chmod(0o755)
    path = os.pathsep.join(map(str, (shims, copy, links, broken, tmp_path / "gone")))
    cache_file = tmp_path / "cache" / "interpreters.json"
    there = Interpreters(spawner, cache_file, environ={"PATH": path, "HOME": str(tmp_path)}, places=())
    found = await there.discover()
    assert [(one.path, one.version) for one in found] == [(binary, sys.version_info[:3])]
    assert list(json.loads(cache_file.read_text())) == [str(binary)]


@pytest.mark.parametrize(
    ("variable", "below"), [("PYENV_ROOT", "versions/3.8.1"), ("UV_PYTHON_INSTALL_DIR", "cpython-3.8.1")]
)
async def test_those_of_pyenv_and_uv_are_found_where_their_variables_say(tmp_path, spawner, variable, below):
    path = tmp_path / "elsewhere" / below / "bin" / "python3.8"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    cache_file = tmp_path / "interpreters.json"
    cache_file.write_text(json.dumps({str(path): (path.stat().st_mtime_ns, [3, 8, 1])}))
    environ = {"PATH": "", "HOME": str(tmp_path), variable: str(tmp_path / "elsewhere")}
    there = Interpreters(spawner, cache_file, environ=environ, places=())
    assert (await there.choose("3.8", fallback=False)).interpreter.path == path


async def test_a_damaged_cache_file_is_forgotten(machine, tmp_path, spawner):
    (tmp_path / "i.json").write_text('{"/x": 1}')
    there = Interpreters(spawner, tmp_path / "i.json", environ={"PATH": "", "HOME": str(tmp_path)}, places=())
    assert [one.version[:2] for one in await there.discover()] == [OWN]
