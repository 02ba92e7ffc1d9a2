"""Experimenters cancel by their client's database record or by a `_status` artifact (INTEROP.md 4.4)."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import io
import json
import tarfile
import tracemalloc

import pytest

from runner.experiment import cancel
from tests.integration import harness
from tests.integration.harness import ThisPython, daemon

SCRIPT = "import time; print('begun', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(cancel, "LOOK_SECS", 0.1)


async def stopped(it) -> None:
    await it.settled()
    (document,) = it.documents()
    assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("stopped", "cancelled")
    assert it.output().splitlines()[0] == "begun"
    assert "stopped" in it.output().splitlines()[-1]
    assert not it.dead()


async def test_the_clients_record_says_stopped(tmp_path):
    database = {"type": "local", "endpoint": str(tmp_path), "bucket": "db"}
    async with daemon(tmp_path) as it:
        await it.submit(SCRIPT, config={"database": database})
        await it.until(it.printed)
        record = tmp_path / "db" / "experiments" / "exp"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"status": "running"}))
        record.write_text(json.dumps({"status": "Stopped"}))
        await stopped(it)


async def test_it_is_asked_to_end_then_made_to_and_what_it_saved_in_between_is_stored(tmp_path):
    script = """
import pathlib, signal, time
def save(*_):
    pathlib.Path("../modeldir/saved").write_text("in time")
    print("saved", flush=True)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
while True:
    time.sleep(600)
"""
    database = {"type": "local", "endpoint": str(tmp_path), "bucket": "db"}
    record = tmp_path / "db" / "experiments" / "exp"
    record.parent.mkdir(parents=True)
    async with daemon(tmp_path) as it:
        await it.submit(script, config={"database": database})
        await it.until(it.printed)
        record.write_text(json.dumps({"status": "stopped"}))
        await it.until(lambda: b"saved" in it.printed())  # TERM
        await stopped(it)  # KILL
        assert it.output().splitlines()[:2] == ["begun", "saved"]
        with tarfile.open(it.storage / "experiments/exp/modeldir.tar") as archive:
            assert "saved" in [name.rpartition("/")[2] for name in archive.getnames()]


async def test_it_need_not_have_begun(tmp_path, monkeypatch):
    class Slow(ThisPython):
        @contextlib.asynccontextmanager
        async def prepare(self, spec, log):
            await asyncio.sleep(600)  # an environment that takes its time
            yield

    monkeypatch.setattr(harness, "ThisPython", Slow)
    database = {"type": "local", "endpoint": str(tmp_path), "bucket": "db"}
    record = tmp_path / "db" / "experiments" / "exp"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"status": "stopped"}))
    async with daemon(tmp_path) as it:
        await it.submit(SCRIPT, config={"database": database})
        await it.until(it.documents)
        await it.settled()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("stopped", "cancelled")


@pytest.mark.parametrize("packed", ["w", "w:gz", ""])
async def test_a_status_artifact_says_stopped(tmp_path, packed):
    async with daemon(tmp_path) as it:
        body = json.loads(it.message(SCRIPT))
        status = it.storage / "status.tar"
        body["experiment"]["artifacts"]["_status"] = {
            "mutable": False,
            "qualified": f"file://{status}",
            "key": "status.tar",
        }
        content = json.dumps({"key": "exp", "status": "stopped"}).encode()
        status.write_bytes(b"{}")
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), json.dumps(body).encode())
        await it.until(it.printed)
        if packed:
            archive = io.BytesIO()
            with tarfile.open(fileobj=archive, mode=packed) as tar:
                member = tarfile.TarInfo("./status.json")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            content = archive.getvalue()
        status.write_bytes(content)
        await stopped(it)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"status": 7}', b'{"status": "running"}', b"\x1f\x8b", b"\0" * 2000, b"[" * 5000],
)
async def test_anything_else_stops_nothing(tmp_path, content):
    go = tmp_path / "go"
    script = f"import pathlib, time; print('begun', flush=True)\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)"
    database = {"type": "local", "endpoint": str(tmp_path), "bucket": "db"}
    record = tmp_path / "db" / "experiments" / "exp"
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    async with daemon(tmp_path) as it:
        await it.submit(script, config={"database": database})
        await it.until(it.printed)
        seen = 0

        def looked() -> bool:
            nonlocal seen
            seen += 1
            return seen > 20  # of the harness's 20 ms: several looks

        await it.until(looked)
        go.touch()
        await it.settled()
        assert it.documents()[0]["studioml"]["status"] == "completed"


def test_a_record_as_only_python_writes_it_is_read():
    assert cancel._stopped(b'{"info": {"loss": NaN}, "status": "stopped"}')


def test_a_status_that_would_take_all_memory_is_none():
    """A hundred bytes, of which the standard library would make 64 MB at once (or 64 GB)."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 64 << 20
    packer = bz2.BZ2Compressor()
    bomb = packer.compress(name.tobuf(tarfile.GNU_FORMAT))
    for _ in range(64):
        bomb += packer.compress(bytes(1 << 20))
    bomb += packer.flush()
    tracemalloc.start()
    try:
        assert not cancel._stopped(bomb)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
