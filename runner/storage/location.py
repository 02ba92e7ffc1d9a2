"""From what a message says of an artifact to the one place where it is. Pure; INTEROP.md 1.6 and 3.2 have the forms.

The rules, where the message leaves a choice:

- *TLS*: yes for Amazon, for a host that the message's storage or database endpoint names with https://, with --s3-ca or
  --s3-cert, and for port 443. No for a host that one of these endpoints names with http://, for any other port, and for
  a bare IP address. A host name without a port: yes.
- *Region*: the host's own (s3.<region>.amazonaws.com), the artifact's, its credentials', the endpoint's, then
  AWS_DEFAULT_REGION of the message's environment.
- *Credentials*: the artifact's, those of the storage or database endpoint on the same host, the message's environment,
  else none. Never the runner's own. A pair of empty strings says "none" and ends the search; a `$VARIABLE` that the
  client left unexpanded counts as absent.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from runner import errors
from runner.storage import address
from runner.storage.base import Credentials, Location

if TYPE_CHECKING:
    from runner import config
    from runner.request.model import Artifact, Endpoint, Request

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}(?=://)", re.ASCII)
_UNEXPANDED = re.compile(r"\$(\{\w+\}|[A-Z_][A-Z0-9_]*)")
_TLS_PORT = 443


def locate(artifact: Artifact, request: Request, s3: config.S3, *, allow_env_secrets: bool) -> Location:
    """Where `artifact` is: by `qualified`, else `url`, else `key` in the request's storage.

    Raises `errors.MalformedMessage` for an address that is none (or for no address at all) and
    `errors.UnsupportedRequest` for a place that this runner cannot reach by any attempt. Their texts hold no secrets:
    an address is not repeated, it may hold some.
    """
    try:
        return _Search(artifact, request, s3, allow_env_secrets=allow_env_secrets).found()
    except ValueError as exc:
        raise errors.MalformedMessage(
            f"the address of the artifact {artifact.tag!r} is unusable: {exc}"
        ) from None


class _Search:
    """One artifact's search: what it and its request say, at hand for every rule. Raises `ValueError` as well."""

    def __init__(
        self, artifact: Artifact, request: Request, s3: config.S3, *, allow_env_secrets: bool
    ) -> None:
        self._artifact = artifact
        self._request = request
        self._s3 = s3
        self._allow_env_secrets = allow_env_secrets
        self._servers: list[tuple[str, bool | None, Endpoint]] = []
        for said in (request.storage, request.database):
            if said is not None and said.endpoint:
                with contextlib.suppress(
                    ValueError
                ):  # an endpoint that is none names no host; nothing may need it
                    host, tls = address.split_endpoint(said.endpoint)
                    self._servers.append((address.endpoint(host)[0], tls, said))

    def found(self) -> Location:
        uri = self._artifact.qualified or self._artifact.url
        if not uri:
            return self._by_key()
        address.check_text(uri)
        if uri.startswith("/"):
            return self._file(uri)
        scheme, _, rest = uri.partition(":")
        match scheme.lower():
            case "s3":
                return self._s3_object(rest)
            case "file":
                return self._file(address.file_path(rest))
            case "http" | "https" as web:
                return self._web(web, rest)
            case "gs":
                raise self._unsupported("is in Google storage, which is not built into this runner yet")
            case "dockerhub" | "shub":
                raise self._unsupported("is a container image, which cannot be fetched as an artifact")
            case _:
                known = _SCHEME.match(uri)
                raise self._unsupported(
                    f"has an address of an unknown kind{f' ({known[0]})' if known else ''}"
                )

    def _by_key(self) -> Location:
        """The artifact in the storage of the request: `--reuse` and its like name nothing but a key."""
        storage, key = self._request.storage, self._artifact.key
        if not key or storage is None or not (storage.endpoint or storage.bucket):
            raise ValueError("there is none, nor a key and a storage of the request to build it from")
        root, bucket = storage.endpoint or "", storage.bucket or self._artifact.bucket or ""
        for text in (root, bucket, key):
            address.check_text(text)
        match (storage.type or "s3").lower():
            case "s3":
                return self._object(self._configured_host(), bucket, key)
            case "local":
                root = address.file_path(root.removeprefix("file:")) if root.startswith("file:") else root
                return self._file("/".join(part for part in (root, bucket, key) if part))
            case _:
                raise self._unsupported("is in a storage of a kind that is not built into this runner")

    def _s3_object(self, rest: str) -> Location:
        """`//host[:port]/bucket/key` or `//bucket/key`, with doubled slashes anywhere."""
        host, *names = address.split_path(rest) or [""]
        if "@" in host:
            raise ValueError("it has a user name inside")
        if self._is_bucket(host):
            return self._object(self._configured_host(), host, "/".join(names))
        if not names:
            raise ValueError("it has no bucket")
        return self._object(host, names[0], "/".join(names[1:]))

    def _file(self, path: str) -> Location:
        """A path on this machine; its root is what is left without the artifact's key."""
        if not path.startswith("/"):
            raise ValueError("it does not begin at the root")
        names = address.split_path(path)
        if not names:
            raise ValueError("it names no file")
        key = address.split_path(self._artifact.key or "") or names[-1:]
        if names[-len(key) :] != key:
            key = names[-1:]
        return Location(scheme="file", bucket="/" + "/".join(names[: -len(key)]), key="/".join(key))

    def _web(self, scheme: str, rest: str) -> Location:
        """`//host[:port]/path?query`; the query is part of the key, and of no text: it may be a signature."""
        found = re.fullmatch(r"//([^/?#]+)/?([^#]*)(#.*)?", rest)
        if not found:
            raise ValueError("it has no host")
        if "@" in found[1]:
            raise self._unsupported("has a web address with a user name inside, which is not built in")
        host, _ = address.endpoint(found[1])
        return Location(scheme=scheme, endpoint=host, tls=scheme == "https", key=found[2])

    def _is_bucket(self, host: str) -> bool:
        if ":" in host or host.lower().endswith(".com") or address.is_ip(host):
            return False
        if any(host.lower() == server for server, _, _ in self._servers):
            return False
        return host == self._artifact.bucket or "." not in host

    def _configured_host(self) -> str:
        storage = self._request.storage
        if storage is None or not storage.endpoint or (storage.type or "s3").lower() != "s3":
            return address.AMAZON
        return address.split_endpoint(storage.endpoint)[0]

    def _object(self, host: str, bucket: str, key: str) -> Location:
        endpoint, region = address.endpoint(host)
        if not _BUCKET.fullmatch(bucket):
            raise ValueError("its bucket is none")
        key = "/".join(address.split_path(key))
        if not key:
            raise ValueError("it has no key")
        return Location(
            scheme="s3",
            endpoint=endpoint,
            tls=self._tls(endpoint),
            bucket=bucket,
            key=key,
            region=region or self._region(endpoint),
            credentials=self._credentials(endpoint),
        )

    def _tls(self, endpoint: str) -> bool:
        name, port = address.split_host(endpoint)
        said = {tls for server, tls, _ in self._servers if server == endpoint}
        if address.is_amazon(name) or True in said or self._s3.ca or self._s3.cert or port == _TLS_PORT:
            return True
        return not (False in said or port or address.is_ip(name))

    def _same_server(self, endpoint: str) -> list[Endpoint]:
        return [said for server, _, said in self._servers if server == endpoint]

    def _region(self, endpoint: str) -> str | None:
        said = [self._artifact.region, self._artifact.credentials and self._artifact.credentials.region]
        for server in self._same_server(endpoint):
            said += [server.region, server.credentials and server.credentials.region]
        said.append(self._request.env.get("AWS_DEFAULT_REGION"))
        return next((region for region in said if region and not _UNEXPANDED.fullmatch(region)), None)

    def _credentials(self, endpoint: str) -> Credentials | None:
        pairs = [self._artifact.credentials, *(server.credentials for server in self._same_server(endpoint))]
        for pair in pairs:
            if pair is not None and not _unexpanded(pair.access_key, pair.secret_key):
                return _usable(pair.access_key, pair.secret_key, pair.session_token)
        if not self._allow_env_secrets:
            return None
        env = self._request.env
        access_key = env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_ACCESS_KEY") or ""
        secret_key = env.get("AWS_SECRET_ACCESS_KEY") or env.get("AWS_SECRET_KEY") or ""
        if _unexpanded(access_key, secret_key):
            return None
        return _usable(access_key, secret_key, env.get("AWS_SESSION_TOKEN"))

    def _unsupported(self, why: str) -> errors.UnsupportedRequest:
        return errors.UnsupportedRequest(f"the artifact {self._artifact.tag!r} {why}")


def _unexpanded(*texts: str) -> bool:
    return any(_UNEXPANDED.fullmatch(text) for text in texts)


def _usable(access_key: str, secret_key: str, session_token: str | None) -> Credentials | None:
    if not access_key or not secret_key:
        return None
    return Credentials(access_key=access_key, secret_key=secret_key, session_token=session_token or None)
