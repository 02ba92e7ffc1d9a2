"""A registry of container images on loopback: enough of the distribution protocol for an engine to pull from it, over plain HTTP."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from typing import TYPE_CHECKING, Any, Self

from tests.servers.ports import free_ports

if TYPE_CHECKING:
    import pathlib

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


class OciRegistry:
    """Serves what was pushed, from a thread. `pulls` counts manifests that were fetched by GET; `hold` keeps blobs back."""

    def __init__(self) -> None:
        self.pulls = 0
        self.hold = threading.Event()
        self.held = threading.Event()  #: somebody waits for a blob that is kept back
        self.status = 0  #: what every request is answered with, when it is not 0
        self.hold.set()
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, bytes] = {}
        self._server: http.server.ThreadingHTTPServer | None = None
        [self.port] = free_ports(1)

    def __enter__(self) -> Self:
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.answer(self, body=True)

            def do_HEAD(self) -> None:
                registry.answer(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="registry", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def push(self, name: str, tag: str, root: pathlib.Path, command: list[str]) -> str:
        """A root file system as an image of one layer; its reference by digest."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as archive:
            archive.add(root, arcname=".")
        packed = gzip.compress(layer.getvalue(), 1)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin:/usr/local/bin", "FRUIT=apple"], "Entrypoint": command},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer.getvalue())]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": self._put(_CONFIG, json.dumps(config).encode()),
            "layers": [self._put(_LAYER, packed)],
        }
        body = json.dumps(manifest).encode()
        for version in (tag, _digest(body)):
            self._manifests[f"{name}/manifests/{version}"] = body
        return f"docker://127.0.0.1:{self.port}/{name}@{_digest(body)}"

    def _put(self, media_type: str, content: bytes) -> dict[str, Any]:
        self._blobs[_digest(content)] = content
        return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}

    def answer(self, request: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.removeprefix("/v2/")
        if self.status:
            self._send(request, self.status, "text/plain", b"", body=body)
        elif path == "":
            self._send(request, 200, "application/json", b"{}", body=body)
        elif path in self._manifests:
            self.pulls += body
            self._send(request, 200, _MANIFEST, self._manifests[path], body=body)
        elif (digest := path.rpartition("/")[2]) in self._blobs:
            if not self.hold.is_set():
                self.held.set()
            self.hold.wait()
            self._send(request, 200, "application/octet-stream", self._blobs[digest], body=body)
        else:
            error = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
            self._send(request, 404, "application/json", json.dumps(error).encode(), body=body)

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        kind: str,
        content: bytes,
        *,
        body: bool,
    ) -> None:
        try:
            request.send_response(status)
            request.send_header("Content-Type", kind)
            request.send_header("Content-Length", str(len(content)))
            request.send_header("Docker-Content-Digest", _digest(content))
            request.end_headers()
            if body:
                request.wfile.write(content)
        except ConnectionError:  # the other side was told to stop
            pass


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
