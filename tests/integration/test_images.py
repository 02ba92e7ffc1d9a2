"""Images that may not be run, from the message to its end."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from runner import errors
from tests.integration import harness

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from runner.executors.base import Image, Prepared, RunSpec


@pytest.mark.parametrize("early", [True, False])
async def test_an_image_is_refused_before_anything_is_fetched_with_the_end_of_one_that_is_refused_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    asked: list[str] = []

    async def refuse(_: object, image: Image | None) -> None:
        assert image is not None
        assert image.file is not None
        asked.append(image.file.name)
        raise errors.UnsupportedRequest("untrusted image specified")

    @contextlib.asynccontextmanager
    async def prepare(self: object, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        del log
        await refuse(self, spec.image)
        raise AssertionError
        yield

    monkeypatch.setattr(harness.ThisPython, "check", lambda _, engine: None)
    monkeypatch.setattr(harness.ThisPython, "prepare", prepare)
    if early:
        monkeypatch.setattr(harness.ThisPython, "vet", refuse)
    async with harness.daemon(tmp_path) as it:
        body = json.loads(it.message("print('ran')"))
        image = {"mutable": False, "unpack": False, "qualified": f"file://{it.storage}/images/x.sif"}
        body["experiment"]["artifacts"]["_singularity"] = image
        (it.storage / "images").mkdir()
        (it.storage / "images" / "x.sif").write_bytes(b"x")
        if early:  # nobody is to miss them
            (it.storage / "images" / "x.sif").unlink()
            (it.storage / "exp-ws.tar").unlink()
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), json.dumps(body).encode())
        await it.settled()
        assert asked == ["x.sif"]
        (dead,) = it.dead()
        assert (dead["reason"], dead["attempts"]) == ("unsupported", 1)
        assert "untrusted image specified" in dead["text"]
        (document,) = it.documents()
        told = document["studioml"]
        assert (told["status"], told["reason"]) == ("failed", "unsupported")
        assert it.output() == "studio-runner: untrusted image specified\n"
        assert {path.name for path in it.storage.glob("experiments/exp/*")} == {"output.tar"}
