"""An experiment in a Singularity image, from its message to its results. The rest is in tests/service/test_singularity.py."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages
from tests.servers.apptainer import python_root

if TYPE_CHECKING:
    import pathlib

    from tests.servers.apptainer import Apptainer
    from tests.servers.daemon import MakeDaemon

SCRIPT = """
import json, os, sys
print(json.dumps({"experiment": {"prefix": sys.prefix, "word": os.environ["WORD"], "cards": os.environ["CUDA_VISIBLE_DEVICES"]}}))
open("../modeldir/model", "w").write("trained")
"""


@pytest.mark.service
@pytest.mark.timeout(300)
def test_an_image_file_runs_and_an_untrusted_reference_is_a_dead_letter(
    daemons: MakeDaemon, apptainer: Apptainer, tmp_path: pathlib.Path
):
    storage = tmp_path / "storage"
    storage.mkdir()
    apptainer.build(storage / "image.sif", python_root(tmp_path / "root"), tmp_path)
    shutil.rmtree(tmp_path / "root")
    daemon = daemons(env={"PATH": f"{apptainer.bin}{os.pathsep}{os.environ['PATH']}"})
    queue = daemon.queue_root / "local_images"
    queue.mkdir()
    image = {"_singularity": {"mutable": False, "unpack": False, "key": "image.sif"}}
    config = {"env": {"WORD": "a'b $(id)\n"}}
    (queue / "m1").write_bytes(messages.on_directory(storage, SCRIPT, "one", artifacts=image, config=config))
    daemon.until(lambda: [run for run in daemon.runs() if run["stage"] == "done"])
    [found] = (storage / "metadata").glob("scrape-host-*")
    document = json.loads(found.read_text())
    assert document["studioml"]["status"] == "completed", document
    assert document["experiment"] == {"prefix": "/opt/python", "word": "a'b $(id)\n", "cards": "-1"}
    assert document["runner"]["environment"]["engine"] == apptainer.said
    with tarfile.open(storage / "experiments" / "one" / "modeldir.tar") as model:
        assert any(name.endswith("model") for name in model.getnames())
    evil = {"_singularity": {"mutable": False, "qualified": "dockerhub://tensorflow/../evil"}}
    (queue / "m2").write_bytes(messages.on_directory(storage, SCRIPT, "two", artifacts=evil))
    letters = daemon.until(lambda: list((daemon.state_dir / "dead-letter").rglob("*.json")))
    assert "untrusted image specified" in letters[0].read_text()
