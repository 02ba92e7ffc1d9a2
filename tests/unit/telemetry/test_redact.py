from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.telemetry.redact import MARK, names_secret, redact_text, redact_value, secrets

LEAKS = [
    "amqp://guest:canary@host:5672/%2f",
    "amqps://guest:ca/na@ry-canary@host/",
    "pip install git+https://canary@github.com/a/b@v1#egg=b",
    "http://u:canary@host/x?a=1 and http://v:canary@other",
    '{"a": {"secret_access_key": "canary", "b": 1}}',
    '{"secret_access_key": "with \\" quote canary", "b": 1}',
    "{'password': 'canary', 'n': 3}",
    '"{\\"secret_key\\": \\"canary\\", \\"y\\": 1}"',
    "AWS_SECRET_ACCESS_KEY=canary FOO=1",
    "export MINIO_ACCESS_KEY: canary",
    "WANDB_KEY=canary",
    "DB_PWD=canary DB_PASS=canary",
    "api-key: canary",
    "run --password canary --http-token=canary -token canary",
    "Authorization: AWS4-HMAC-SHA256 Credential=canary/x, Signature=canary",
    'headers={"Authorization": "Basic canary"}',
    "authorization: Bearer canary1234",
    "sent Bearer canary.canary-canary",
    "http://h/b?X-Amz-Credential=canary%2Fx&X-Amz-Security-Token=canary&X-Amz-Signature=canary&x=1",
    "https://acct.blob/x?sv=1&sig=canary&se=2",
    "-----BEGIN RSA PRIVATE KEY-----\ncanary\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----\ncanary cut off",
    'passphrase="canary',
]

PLAIN = [
    "",
    "experiment started",
    "ssh://git@github.com/a/b.git",
    "http://127.0.0.1:9000/bucket/key@v1",
    "s3://host:9000//bucket/key",
    "max_tokens=512 tokens: 4.5 n_tokens: 3)",
    "tokenizer=bert tokenize: yes",
    "bypass the compass",
    "key=3 monkey=4",
    "mail a@b.c",
    f"password={MARK}",
]


@pytest.mark.parametrize("text", LEAKS)
def test_a_secret_leaves_the_text(text):
    assert "canary" not in redact_text(text)
    assert MARK in redact_text(text)


@pytest.mark.parametrize("text", PLAIN)
def test_an_ordinary_text_stays(text):
    assert redact_text(text) == text


def test_what_stands_around_a_secret_stays():
    assert redact_text("amqp://u:p@h:1/%2f is away") == "amqp://***@h:1/%2f is away"
    assert redact_text("A_TOKEN=x B=1") == "A_TOKEN=*** B=1"
    assert json.loads(redact_text('{"secret_key": "x", "b": 1}')) == {"secret_key": MARK, "b": 1}
    assert redact_text("http://h/?X-Amz-Signature=a&x=1") == "http://h/?X-Amz-Signature=***&x=1"


def test_values_below_secret_names_are_replaced_and_the_shape_stays():
    given_value = {
        "credentials": {"type": "aws", "access_key": "canary", "none": None, "list": ["canary", 7]},
        "env": {"WANDB_KEY": "canary", "PATH": "%PATH%:./bin", "URL": "http://u:canary@h"},
        "args": ["--password", "canary", "--lr", "0.1"],
        "pythonenv": ("a==1", "git+https://canary@h/x"),
        "n_tokens": 5,
        "password": 12345,
        "passphrase": True,
        "raw": b"token=canary",
        "http://u:canary@h": 1.5,
    }
    before = repr(given_value)
    assert redact_value(given_value) == {
        "credentials": {"type": MARK, "access_key": MARK, "none": None, "list": [MARK, MARK]},
        "env": {"WANDB_KEY": MARK, "PATH": "%PATH%:./bin", "URL": "http://***@h"},
        "args": ["--password", MARK, "--lr", "0.1"],
        "pythonenv": ["a==1", "git+https://***@h/x"],
        "n_tokens": 5,
        "password": MARK,
        "passphrase": True,
        "raw": "token=***",
        "http://***@h": 1.5,
    }
    assert repr(given_value) == before


@pytest.mark.parametrize(
    "name",
    [
        "secret_access_key",
        "aws_secret",
        "Password",
        "accessKey",
        "access-key",
        "token",
        "HF_TOKEN",
        "API_KEY",
    ],
)
def test_names_of_secrets(name):
    assert names_secret(name)


@pytest.mark.parametrize("name", ["key", "qualified", "project", "monkey", "PATH", "tokenizer", "compass"])
def test_names_of_no_secrets(name):
    assert not names_secret(name)


def test_learned_values_are_replaced_while_they_are_known():
    with secrets.known(["p/w?1234", None, "short", 'q"uote1']):
        with secrets.known(["p/w?1234"]):
            assert redact_text("a p/w?1234 b") == "a *** b"
        assert redact_text("p%2Fw%3F1234") == MARK  # still known to the other
        assert redact_text('q\\"uote1') == MARK
        assert redact_value({"x": ["say p/w?1234"]}) == {"x": ["say ***"]}
        assert redact_text("short") == "short"
    assert redact_text("a p/w?1234 b") == "a p/w?1234 b"


def test_of_two_learned_values_the_longer_goes_first():
    with secrets.known(["canary", "canary-and-more"]):
        assert redact_text("canary-and-more") == MARK


def test_learned_values_are_forgotten_after_a_failure():
    with pytest.raises(KeyError), secrets.known(["canary"]):
        raise KeyError
    assert redact_text("canary") == "canary"


def test_deep_nesting_is_cut():
    value: object = "canary"
    for _ in range(5000):
        value = [value]
    assert "canary" not in repr(redact_value(value))


@pytest.mark.parametrize(
    "piece",
    [
        "://a:",
        "secret",
        'secret="',
        "--a",
        "token ",
        "a-",
        "authorization",
        "bearer ",
        '\\"secret\\": \\"',
        "A_",
        "?sig",
    ],
)
def test_hostile_texts_take_linear_time(piece):
    def cost(times):
        started = time.process_time()
        redact_text(piece * times)
        return time.process_time() - started

    assert cost(40_000) < 40 * max(cost(4_000), 0.005)  # quadratic would be 100 times


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_any_json_value_is_taken_and_redacting_twice_changes_nothing_more(value):
    once = redact_value(value)
    assert repr(redact_value(once)) == repr(once)


@given(st.text(alphabet="abc:/@=\"'\\ -_?&tokenSECRET"))
def test_any_text_is_taken(text):
    assert isinstance(redact_text(text), str)
