"""The README tells the truth: its commands are run as they stand, and its table is the code's."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from runner.options import OPTIONS
from tests.packaging import documents
from tests.packaging.documents import README, ROOT
from tests.servers.daemon import processes_below
from tests.servers.seaweedfs import ADMIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICKSTART, BROKER, INSTALL = [block for block in documents.blocks(README) if block.reason is None]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory that looks like the project's to the commands."""
    directory = tmp_path / "checkout"
    directory.mkdir()
    for name in (".venv", "LICENSE", "README.md", "pyproject.toml", "requirements.lock"):
        (directory / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "runner", directory / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture
def home(tmp_path: Path, environments: Path) -> Iterator[Path]:
    """A home directory whose runner shares the test run's environments; no process may be left in it."""
    state = tmp_path / "home" / "studio" / "state"
    state.mkdir(parents=True, mode=0o700)
    (state / "environments").symlink_to(environments)
    yield tmp_path / "home"
    limit = time.monotonic() + 30
    while processes_below(tmp_path / "home"):
        assert time.monotonic() < limit
        time.sleep(0.05)  # between questions


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_quickstart(checkout, home):
    documents.run(QUICKSTART, checkout, places={"$HOME": str(home)}, env={"PROM_ADDRESS": "127.0.0.1:0"})


@pytest.mark.slow
@pytest.mark.service
@pytest.mark.timeout(500)
def test_the_quickstart_with_servers(checkout, home, rabbitmq, seaweedfs):
    (checkout / "hello").mkdir()
    (checkout / "hello" / "hello.py").write_text('print("hello from a run")\n')
    seaweedfs.make_bucket("readme")
    places = {
        "$HOME": str(home),
        "amqp://USER:PASSWORD@broker.example:5672/": rabbitmq.amqp_url,
        "http://s3.example:9000/BUCKET": f"http://{seaweedfs.endpoint}/readme",
        "=KEY": f"={ADMIN.access_key}",
        "=SECRET": f"={ADMIN.secret_key}",
    }
    env = {
        "PROM_ADDRESS": "127.0.0.1:0",
        "AMQP_MGT_URL": rabbitmq.management_url,
        "QUEUE_MATCH": "^rmq_hello$",  # other tests leave queues behind
    }
    try:
        documents.run(BROKER, checkout, places=places, env=env)
    finally:
        rabbitmq.delete("rmq_hello")
    assert [found.object_name for found in seaweedfs.client().list_objects("readme", recursive=True)]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_installation(checkout, tmp_path):
    documents.run(INSTALL, checkout, places={"/opt/studio-runner": str(tmp_path / "opt")}, env={})
    assert (tmp_path / "opt" / "bin" / "runner").exists()
    assert not (tmp_path / "opt" / "bin" / "pytest").exists()


def test_the_table_of_options_is_the_codes():
    text = README.read_text()
    assert text == documents.with_table(text), "write it anew: python -m tests.packaging.documents"


def test_the_table_shows_only_what_works():
    assert not [option.name for option in OPTIONS if option.missing and option.name in documents.FIRST]


def test_the_rule_of_imports_is_the_one_that_is_checked():
    layers = re.search(r"\nlayers = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert layers
    checked = re.findall(r'"(.+)"', layers[1].replace("runner.", ""))[1:]
    told = re.sub(r"[`\s]", "", README.read_text().split("`make lint` checks it:")[1].split(".\n")[0])
    assert told.split(">") == [layer.replace(" ", "") for layer in checked]


def test_make_knows_the_targets_and_the_tests_are_run_by_one_of_them():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z]+)", README.read_text()))
    assert named <= targets
    assert {"demo", "test", "lint", "bench", "venv"} <= named
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == "make test"
    assert script.index("make lint") < script.index("make test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_picture_is_there_and_stands_for_itself():
    picture = (ROOT / "docs" / "images" / "flow.svg").read_text()
    assert "docs/images/flow.svg" in README.read_text()
    assert "<title" in picture
    assert "<desc" in picture
    assert "<image" not in picture
    assert json.dumps(picture).isascii()
