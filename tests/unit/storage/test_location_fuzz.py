from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from runner import config, errors
from runner.request.model import Artifact, Endpoint, KeyPair, Request
from runner.storage.location import locate

if TYPE_CHECKING:
    from runner.storage.base import Location

SECRET = "hunter2-hunter2"
PAIR = KeyPair(access_key="A", secret_key=SECRET)

SCHEMES = ["s3:", "file:", "http:", "https:", "gs:"]
MARKS = ["//", "/", "..", ".", "@", ":", "[", "]", "::1", "?", "#", "%", "\n", "\0", "\ud800", "ü", " ", "$A"]
NAMES = ["h", "b", "k", "s3-us-west-2.amazonaws.com", "9000", "99999", "localhost", "K"]
pieces = st.lists(st.sampled_from([*SCHEMES, *MARKS, *NAMES]), max_size=12).map("".join)
texts = st.one_of(st.none(), pieces, st.text(max_size=40))
artifacts = st.builds(
    Artifact, tag=st.just("t"), qualified=texts, url=texts, key=texts, bucket=texts, credentials=st.just(PAIR)
)
endpoints = st.builds(Endpoint, type=texts, endpoint=texts, bucket=texts, credentials=st.just(PAIR))


def outcome(artifact: Artifact, storage: Endpoint | None) -> Location | str:
    request = Request(key="k", storage=storage)
    try:
        return locate(artifact, request, config.S3(), allow_env_secrets=True)
    except (errors.MalformedMessage, errors.UnsupportedRequest) as exc:
        return str(exc)


@given(artifact=artifacts, storage=endpoints)
def test_whatever_the_message_says_there_is_a_place_or_a_refusal(artifact, storage):
    found = outcome(artifact, storage)
    if isinstance(found, str):
        assert SECRET not in found
    else:
        check(found)


def check(found: Location) -> None:
    assert found.scheme in {"s3", "file", "http", "https"}
    assert SECRET not in f"{found} {found.uri}"
    assert "@" not in found.endpoint
    assert not any(ord(char) < 32 for char in found.uri)
    if found.scheme in {"s3", "file"}:
        assert found.bucket
        assert found.key
        assert not {"", ".", ".."} & set(found.key.split("/"))
        assert ".." not in found.bucket.split("/")
    if found.scheme == "file":
        assert found.bucket.startswith("/")


@given(user=st.text(min_size=1, max_size=8), scheme=st.sampled_from(["s3", "http", "https", "ftp", "gs"]))
def test_a_password_inside_an_address_never_shows(user, scheme):
    found = outcome(Artifact(tag="t", qualified=f"{scheme}://{user}:{SECRET}@h:9000/b/k"), None)
    # where the text before the password makes it something else, it is part of a path or of a query
    assert SECRET not in (found if isinstance(found, str) else found.endpoint)
