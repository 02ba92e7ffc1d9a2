"""A large archive from S3, unpacked on its way, beside curl piped into tar."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING

from bench.figures import Bar, Figure, median
from bench.lab import BUCKET
from runner import config, units
from runner.storage import archive
from runner.storage.registry import Stores

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab import Lab

FILE_BYTES = 16 << 20


def measure(lab: Lab) -> list[Figure]:
    """Medians of both, in turn."""
    rounds = 2 if lab.quick else 5
    directory = lab.directory / "archive"
    directory.mkdir()
    source = directory / "source.tar"
    _make(source, lab.archive_bytes)
    lab.store.client().fput_object(BUCKET, "large.tar", str(source), part_size=64 << 20)
    source.unlink()
    url = lab.store.client().presigned_get_object(BUCKET, "large.tar", expires=dt.timedelta(hours=1))
    stores = Stores(config.S3())
    store = stores.store(lab.store.location(BUCKET))

    def ours(target: Path) -> None:
        with store.open("large.tar") as stream:
            limits = archive.UnpackLimits(total_bytes=2 * lab.archive_bytes + (1 << 30))
            archive.unpack(stream, target, limits=limits, name_if_file="large.tar")

    def theirs(target: Path) -> None:
        target.mkdir()
        curl = subprocess.Popen(["curl", "-sSf", url], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(target)], stdin=curl.stdout, check=True)
        assert curl.wait() == 0

    secs: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        for name, way in (("ours", ours), ("theirs", theirs)):
            target = directory / name
            os.sync()  # what the one before has left to the disk is not for this one to wait for
            began = time.perf_counter()
            way(target)
            if number:  # the first warms the server
                secs[name].append(time.perf_counter() - began)
            shutil.rmtree(target)
    stores.close()
    return [
        Figure(
            name=f"{units.format_bytes(lab.archive_bytes)} archive from S3, unpacked",
            value=median(secs["ours"]),
            unit="s",
            baseline=median(secs["theirs"]),
            bar=Bar(limit=1.2),
            note="beside curl piped into tar",
        )
    ]


def _make(path: Path, size: int) -> None:
    """Large files, and a few hundred small ones."""
    content = os.urandom(FILE_BYTES)
    scratch = path.with_suffix(".bin")
    with tarfile.open(path, "w") as tar:
        for number in range(max(1, size // FILE_BYTES)):
            scratch.write_bytes(content)
            tar.add(scratch, f"data/part-{number:03}.bin")
        scratch.write_bytes(content[:2000])
        for number in range(300):
            tar.add(scratch, f"small/{number:03}.txt")
    scratch.unlink()
