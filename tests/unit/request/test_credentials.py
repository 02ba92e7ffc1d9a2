from __future__ import annotations

import pytest

from runner.request.model import KeyPair
from tests.unit.request.messages import decoded

PAIR = KeyPair(access_key="AK", secret_key="SK")


def read(wire):
    return decoded({"artifacts": {"a": {"credentials": wire}}})


@pytest.mark.parametrize(
    ("wire", "pair"),
    [
        ({"aws": {"access_key": "AK", "secret_access_key": "SK"}}, PAIR),
        ({"aws": {"access_key": "AK", "secret_key": "SK"}}, PAIR),
        ({"aws": {"access_key": "AK", "secret_key": "no", "secret_access_key": "SK"}}, PAIR),
        ({"AWS": {"Access_Key": "AK", "Secret_Access_Key": "SK"}}, PAIR),
        ({"access_key": "AK", "secret_access_key": "SK"}, PAIR),
        ({"aws": {"aws_access_key": "AK", "aws_secret_key": "SK"}}, PAIR),
        (
            {
                "aws": {
                    "access_key": "AK",
                    "secret_key": "SK",
                    "session_token": "T",
                    "region_name": "eu-west-1",
                    "profile": "p",
                }
            },
            KeyPair(access_key="AK", secret_key="SK", session_token="T", region="eu-west-1"),
        ),
        (
            {"aws": {"access_key": "AK", "secret_key": "SK", "session_token": "", "region": "us-west-2"}},
            KeyPair(access_key="AK", secret_key="SK", region="us-west-2"),
        ),
    ],
)
def test_every_spelling_of_a_key_pair(wire, pair):
    request = read(wire)
    assert request.artifacts[0].credentials == pair
    assert request.warnings == ()


@pytest.mark.parametrize(
    "wire",
    [None, "none", "", {}, {"null": {"access_key": None, "secret_access_key": None}}, {"aws": None}, {"aws": {}},
     {"aws": {"access_key": "", "secret_access_key": ""}}, {"aws": {"access_key": None}}],
)  # fmt: skip
def test_no_credentials(wire):
    request = read(wire)
    assert request.artifacts[0].credentials is None
    assert request.warnings == ()


@pytest.mark.parametrize(
    "wire",
    ["$AWS_CREDS", "whatever", 3, [], {"jwt": {"token": "hush"}}, {"plain": {"user": "u", "password": "hush"}},
     {"aws": {"access_key": "AK"}}, {"aws": {"secret_access_key": "hush"}}, {"aws": "AK:hush"}, {"aws": {"access_key": [], "secret_key": ["hush"]}},
     {"aws": {"access_key": "$AWS_ACCESS_KEY_ID", "secret_access_key": "hush"}},
     {"aws": {"access_key": "AK", "secret_access_key": "${AWS_SECRET_ACCESS_KEY}"}}],
)  # fmt: skip
def test_unusable_credentials_are_absent_and_told_without_their_secrets(wire):
    request = read(wire)
    assert request.artifacts[0].credentials is None
    assert any("experiment.artifacts.a.credentials" in line for line in request.warnings)
    assert "hush" not in " ".join(request.warnings)


def test_a_secret_may_hold_a_dollar():
    assert read({"aws": {"access_key": "AK", "secret_key": "pa$$word"}}).artifacts[0].credentials


@pytest.mark.parametrize(
    "style",
    [
        {"credentials": {"aws": {"access_key": "AK", "secret_key": "SK"}}},
        {"aws_access_key": "AK", "aws_secret_key": "SK"},
    ],
)
def test_storage_and_database_hold_credentials_in_both_styles(style):
    request = decoded(config={"storage": {"type": "s3", **style}, "database": style})
    assert request.storage.credentials == PAIR
    assert request.database.credentials == PAIR


def test_the_region_is_the_endpoints_own_or_else_the_credentials():
    pair = {"aws": {"access_key": "AK", "secret_key": "SK", "region": "us-west-2"}}
    assert decoded(config={"storage": {"credentials": pair}}).storage.region == "us-west-2"
    assert (
        decoded(config={"storage": {"credentials": pair, "region": "eu-west-1"}}).storage.region
        == "eu-west-1"
    )
