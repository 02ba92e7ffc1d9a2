"""Requests for the e2e tests, in the form of the client."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pathlib

    from tests.servers.seaweedfs import SeaweedFs

MUTABLE = ("modeldir", "output", "retval", "_metadata")

#: Prints, and waits until a file is there.
WAIT = """
import os, pathlib, sys, time
print("begun", os.getpid(), flush=True)
while not pathlib.Path({go!r}).exists():
    time.sleep(0.02)
pathlib.Path("../modeldir/model").write_text("trained")
print("done", flush=True)
"""


def archive(files: dict[str, str]) -> bytes:
    """A tar as the client packs a workspace."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return packed.getvalue()


def on_directory(storage: pathlib.Path, script: str, key: str, **experiment: Any) -> bytes:
    """A request whose artifacts are below a directory."""
    (storage / f"{key}.tar").write_bytes(archive({"main.py": script}))
    return _message(f"file://{storage}", script, key, {}, experiment)


def on_s3(server: SeaweedFs, bucket: str, script: str, key: str, **experiment: Any) -> bytes:
    """A request whose artifacts are in a bucket."""
    data = archive({"main.py": script})
    server.client().put_object(bucket, f"{key}.tar", io.BytesIO(data), len(data))
    location = server.location(bucket)
    assert location.credentials is not None
    keys = {
        "access_key": location.credentials.access_key,
        "secret_access_key": location.credentials.secret_key,
    }
    storage = {
        "type": "s3",
        "endpoint": f"http://{location.endpoint}",
        "bucket": bucket,
        "credentials": {"aws": keys},
    }
    return _message(f"s3://{location.endpoint}/{bucket}", script, key, {"storage": storage}, experiment)


def _message(root: str, script: str, key: str, config: dict[str, Any], experiment: dict[str, Any]) -> bytes:
    artifacts: dict[str, Any] = {"workspace": {"mutable": False, "unpack": True, "key": f"{key}.tar"}}
    artifacts |= {
        tag: {"mutable": True, "unpack": True, "key": f"experiments/{key}/{tag}.tar"} for tag in MUTABLE
    }
    artifacts |= experiment.pop("artifacts", {})
    for artifact in artifacts.values():
        if "key" in artifact:
            artifact.setdefault("qualified", f"{root}/{artifact['key']}")
    config |= experiment.pop("config", {})
    base = {"key": key, "filename": "main.py", "args": [], "pythonver": "3.11", "artifacts": artifacts}
    return json.dumps({"experiment": base | experiment, "config": config}).encode()
