from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner import config, errors
from runner.request.model import Artifact, Endpoint, KeyPair, Request
from runner.storage.base import Credentials, Location
from runner.storage.location import locate

ARTIFACT_KEY = KeyPair(
    access_key="ARTIFACT", secret_key="artifact-secret", session_token="token", region="eu-west-3"
)
STORAGE_KEY = KeyPair(access_key="STORAGE", secret_key="storage-secret")
ENV = {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "env-secret", "AWS_DEFAULT_REGION": "us-west-2"}


def place(
    *, s3: config.S3 | None = None, allow_env_secrets: bool = True, request: Any = None, **artifact: Any
) -> Location:
    asked = Request(key="k", **(request or {}))
    return locate(
        Artifact(tag="t", **artifact), asked, s3 or config.S3(), allow_env_secrets=allow_env_secrets
    )


def s3_at(endpoint: str = "http://minio.lan:9000", **members: Any) -> dict[str, Any]:
    return {"storage": Endpoint(type="s3", endpoint=endpoint, **({"bucket": "art"} | members))}


@pytest.mark.parametrize(
    ("uri", "endpoint", "bucket", "key"),
    [
        ("s3://h:9000/b/k", "h:9000", "b", "k"),
        ("s3://h:9000//b//deep///k", "h:9000", "b", "deep/k"),
        ("s3:////h:9000/b/k", "h:9000", "b", "k"),
        ("S3://Host.COM/b/Key", "host.com", "b", "Key"),
        ("s3://s3.amazonaws.com/b/k", "s3.amazonaws.com", "b", "k"),
        ("s3://s3-us-west-2.amazonaws.com/b/k", "s3.amazonaws.com", "b", "k"),
        ("s3://[::1]:9000/b/k", "[::1]:9000", "b", "k"),
        ("s3://h:9000/b/a b+c%20d?e#f@g/ü", "h:9000", "b", "a b+c%20d?e#f@g/ü"),
        ("s3://bucket/deep/key", "s3.amazonaws.com", "bucket", "deep/key"),
        ("s3://10.0.0.5/b/k", "10.0.0.5", "b", "k"),
    ],
)
def test_an_s3_address_is_taken_apart(uri, endpoint, bucket, key):
    found = place(qualified=uri)
    assert (found.scheme, found.endpoint, found.bucket, found.key) == ("s3", endpoint, bucket, key)


def test_the_bucket_form_goes_to_the_configured_endpoint_and_needs_the_hint_when_the_bucket_has_dots():
    found = place(qualified="s3://my.bucket/k", bucket="my.bucket", request=s3_at())
    assert (found.endpoint, found.bucket, found.key) == ("minio.lan:9000", "my.bucket", "k")
    found = place(qualified="s3://my.host/b/k", bucket="other", request=s3_at())
    assert (found.endpoint, found.bucket) == ("my.host", "b")


def test_a_host_that_the_request_names_as_its_endpoint_is_no_bucket():
    found = place(qualified="s3://minio/b/k", bucket="minio", request=s3_at("http://minio"))
    assert (found.endpoint, found.bucket, found.key, found.tls) == ("minio", "b", "k", False)


@pytest.mark.parametrize(
    ("uri", "request_", "tls"),
    [
        ("s3://s3.amazonaws.com/b/k", {}, True),
        ("s3://s3.cn-north-1.amazonaws.com.cn/b/k", {}, True),
        ("s3://s3-eu-west-1.amazonaws.com/b/k", s3_at("http://s3-eu-west-1.amazonaws.com"), True),
        ("s3://minio.lan:9000/b/k", s3_at("http://minio.lan:9000"), False),
        ("s3://minio.lan:9000/b/k", s3_at("https://user:secret@minio.lan:9000/"), True),
        (
            "s3://minio.lan:9000/b/k",
            {"database": Endpoint(type="s3", endpoint="https://MINIO.lan:9000")},
            True,
        ),
        ("s3://minio.lan:9000/b/k", s3_at("https://other:9000"), False),
        ("s3://minio.lan:443/b/k", {}, True),
        ("s3://minio.lan/b/k", {}, True),
        ("s3://minio.lan/b/k", s3_at("http://minio.lan"), False),
        ("s3://10.0.0.5/b/k", {}, False),
    ],
)
def test_tls_follows_the_documented_rule(uri, request_, tls):
    assert place(qualified=uri, request=request_).tls is tls


@pytest.mark.parametrize(
    "s3", [config.S3(ca=Path("ca.pem")), config.S3(cert=Path("c.pem"), key=Path("k.pem"))]
)
def test_the_operators_tls_files_mean_tls(s3):
    assert place(qualified="s3://h:9000/b/k", s3=s3).tls


def test_the_region_is_the_hosts_then_the_artifacts_then_its_credentials_then_the_endpoints_then_the_environments():
    env = {"env": ENV}
    there = s3_at(region="eu-north-1")
    uri = "s3://minio.lan:9000/b/k"
    regional = "s3://s3.ap-southeast-2.amazonaws.com/b/k"
    assert place(qualified=regional, region="x", credentials=ARTIFACT_KEY).region == "ap-southeast-2"
    assert (
        place(qualified=uri, region="sa-east-1", credentials=ARTIFACT_KEY, request=there).region
        == "sa-east-1"
    )
    assert place(qualified=uri, credentials=ARTIFACT_KEY, request=there).region == "eu-west-3"
    assert place(qualified=uri, request=there | env).region == "eu-north-1"
    assert place(qualified=uri, request=env).region == "us-west-2"
    assert place(qualified=uri).region is None


def test_credentials_are_the_artifacts_then_the_storages_on_the_same_host_then_the_environments_then_none():
    request = s3_at(credentials=STORAGE_KEY) | {"env": ENV}
    here, elsewhere = "s3://minio.lan:9000/b/k", "s3://other:9000/b/k"
    own = place(qualified=here, credentials=ARTIFACT_KEY, request=request).credentials
    assert own == Credentials(access_key="ARTIFACT", secret_key="artifact-secret", session_token="token")
    assert place(qualified=here, request=request).credentials == Credentials(
        access_key="STORAGE", secret_key="storage-secret"
    )
    assert place(qualified=elsewhere, request=request).credentials == Credentials(
        access_key="ENV", secret_key="env-secret"
    )
    assert place(qualified=elsewhere, request=request, allow_env_secrets=False).credentials is None
    assert place(qualified=elsewhere).credentials is None


def test_the_other_names_of_the_environments_credentials():
    env = {"AWS_ACCESS_KEY": "A", "AWS_SECRET_KEY": "S", "AWS_SESSION_TOKEN": "T"}
    assert place(qualified="s3://h:9000/b/k", request={"env": env}).credentials == Credentials(
        access_key="A", secret_key="S", session_token="T"
    )


@pytest.mark.parametrize("left", ["$AWS_ACCESS_KEY_ID", "${AWS_ACCESS_KEY_ID}", "${my_key}"])
def test_a_variable_left_unexpanded_is_no_credential(left):
    request = s3_at(credentials=KeyPair(access_key=left, secret_key="s")) | {"env": ENV}
    found = place(qualified="s3://minio.lan:9000/b/k", request=request)
    assert found.credentials is not None
    assert found.credentials.access_key == "ENV"
    env = {
        "AWS_ACCESS_KEY_ID": left,
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "$AWS_DEFAULT_REGION",
    }
    found = place(qualified="s3://minio.lan:9000/b/k", request={"env": env})
    assert found.credentials is None
    assert found.region is None


def test_two_empty_strings_mean_anonymous():
    nobody = KeyPair(access_key="", secret_key="")
    assert place(qualified="s3://h:9000/b/k", credentials=nobody, request={"env": ENV}).credentials is None


@pytest.mark.parametrize(
    ("uri", "key", "root", "found_key"),
    [
        ("file://tmp/x/bucket/deep/key", "deep/key", "/tmp/x/bucket", "deep/key"),
        ("file:///tmp/x/bucket/deep/key", "deep/key", "/tmp/x/bucket", "deep/key"),
        ("file://localhost/tmp/x/key", "key", "/tmp/x", "key"),
        ("file:/tmp/x/key", "key", "/tmp/x", "key"),
        ("/tmp/x/key", "key", "/tmp/x", "key"),
        ("/tmp//x///a b/key", "a b//key", "/tmp/x", "a b/key"),
        ("/tmp/x/other", "key", "/tmp/x", "other"),
        ("/tmp/x/monkey", "key", "/tmp/x", "monkey"),
        ("/tmp/x/key", None, "/tmp/x", "key"),
        ("/key", "key", "/", "key"),
    ],
)
def test_a_file_address_is_a_root_and_a_key(uri, key, root, found_key):
    found = place(qualified=uri, key=key)
    assert (found.scheme, found.bucket, found.key) == ("file", root, found_key)


def test_a_url_keeps_its_query_but_never_shows_it():
    found = place(url="https://Example.org:8443/a%20b/d.csv?X-Signature=secret#part")
    assert (found.scheme, found.endpoint, found.tls) == ("https", "example.org:8443", True)
    assert found.key == "a%20b/d.csv?X-Signature=secret"
    assert found.uri == "https://example.org:8443/a%20b/d.csv"
    assert found.credentials is None


def test_qualified_wins_over_url():
    assert place(qualified="/a/b", url="https://h/x").scheme == "file"


def test_a_key_alone_is_looked_for_in_the_storage_of_the_request():
    found = place(key="experiments/1/retval.tar", request=s3_at("http://s3-us-west-2.amazonaws.com"))
    assert found.uri == "s3://s3.amazonaws.com/art/experiments/1/retval.tar"
    assert (found.tls, found.region) == (True, "us-west-2")
    found = place(key="k", request=s3_at(credentials=STORAGE_KEY))
    assert (found.uri, found.tls) == ("s3://minio.lan:9000/art/k", False)
    assert found.credentials is not None
    assert found.credentials.access_key == "STORAGE"
    local = {"storage": Endpoint(type="local", endpoint="/srv/store", bucket="art")}
    assert place(key="k", request=local).uri == "file:///srv/store/art/k"


HOSTILE = [
    "",
    "file:///etc/../root/key",
    "file://../etc/passwd",
    "file:relative/path",
    "file://",
    "/",
    "s3://",
    "s3://h:9000",
    "s3://h:9000/bucket-only",
    "s3://h:9000/b/../../k",
    "s3://h:9000/b/./k",
    "s3://AKIA:hunter2@h:9000/b/k",
    "s3://h:99999/b/k",
    "s3://h:0/b/k",
    "s3://h:x/b/k",
    "s3://h:9000\n/b/k",
    "s3://h:9000/b/k\r\nX: hunter2",
    "s3://[::1/b/k",
    "s3://[zz]:9000/b/k",
    "s3://-h.com/b/k",
    "s3://h:9000/\u00fcber/k",
    "s3://h:9000/b/\ud800",
    "gs://bucket/key",
    "shub://a/b",
    "dockerhub://a/b",
    "ftp://u:hunter2@h/k",
    "hunter2",
    "http://",
    "http:///x",
    "http://u:hunter2@h/k",
    "http://h:port/k",
    "https://h\x00/k",
    "\x00",
]


@pytest.mark.parametrize("uri", HOSTILE)
@pytest.mark.parametrize("member", ["qualified", "url"])
def test_a_hostile_address_is_refused_and_not_repeated(uri, member):
    with pytest.raises((errors.MalformedMessage, errors.UnsupportedRequest)) as caught:
        place(**{member: uri})
    assert "hunter2" not in str(caught.value)
    assert "'t'" in str(caught.value)


@pytest.mark.parametrize(
    "storage",
    [
        None,
        Endpoint(type="s3"),
        Endpoint(type="s3", endpoint="http://h:9000"),
        Endpoint(type="s3", endpoint="http://u:hunter2@h:port", bucket="b"),
        Endpoint(type="gcloud", bucket="b"),
        Endpoint(type="local", endpoint="relative", bucket="b"),
        Endpoint(type="local", endpoint="/srv/../etc", bucket="b"),
        Endpoint(type="http", endpoint="http://h/x"),
    ],
)
def test_a_key_without_a_usable_storage_is_refused(storage):
    with pytest.raises((errors.MalformedMessage, errors.UnsupportedRequest)) as caught:
        place(key="k", request={"storage": storage})
    assert "hunter2" not in str(caught.value)


def test_google_storage_is_refused_as_not_built_in_yet():
    with pytest.raises(
        errors.UnsupportedRequest, match="Google storage, which is not built into this runner yet"
    ):
        place(qualified="gs://bucket/key")
