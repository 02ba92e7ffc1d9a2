from __future__ import annotations

import json

import pytest

from runner.request.redact import redact, secret_values
from runner.telemetry.redact import MARK
from tests.unit.request.messages import CAPTURED, EXAMPLES, decode, example, message

PAIR = {"access_key": "CANARY-access", "secret_access_key": "CANARY-secret", "session_token": "CANARY-token"}


def shown(raw):
    return json.dumps(redact(raw))


@pytest.mark.parametrize("path", CAPTURED, ids=lambda path: path.stem)
def test_nothing_secret_of_a_real_message_is_shown(path):
    request = decode(path.read_bytes())
    text = shown(request.raw)
    for secret in ("FAKEACCESSKEY", "FAKESECRETKEY", "guest:guest"):
        assert secret in path.read_text()
        assert secret not in text
    assert redact(request.raw)["experiment"]["key"] == request.key
    assert redact(request.raw)["experiment"]["pythonenv"] == list(request.requirements)
    assert (
        redact(request.raw)["experiment"]["artifacts"]["workspace"]["qualified"]
        == request.artifact("workspace").qualified
    )


@pytest.mark.parametrize(
    ("experiment", "config"),
    [
        ({"artifacts": {"a": {"credentials": {"aws": PAIR}}}}, None),
        ({"artifacts": {"a": {"credentials": PAIR}}}, None),
        ({"artifacts": {"a": {"credentials": "CANARY"}}}, None),
        ({"artifacts": {"a": {"credentials": {"jwt": {"token": "CANARY"}, "plain": {"user": "u", "password": "CANARY"}}}}}, None),
        ({"artifacts": {"a": {"qualified": "s3://user:CANARY@h:9000/b/k", "url": "https://CANARY@h/x"}}}, None),
        ({"pythonenv": ["-e git+https://CANARY@github.com/x/y#egg=y", "n @ https://u:CANARY@h/n.whl"]}, None),
        ({"args": ["--token", "CANARY", "--password=CANARY"]}, None),
        (None, {"storage": {"aws_access_key": "CANARY", "aws_secret_key": "CANARY"}, "database": {"credentials": {"AWS": PAIR}}}),
        (None, {"cloud": {"queue": {"rmq": "amqp://u:CANARY@h:5672/%2f", "sqs": {"credentials": {"aws": PAIR}}}}}),
        (None, {"env": {"MY_KEY_1": "CANARY", "api_TOKEN": "CANARY", "DB_PASSWORD": "CANARY", "xSecretx": "CANARY", "AWS_ACCESS_KEY_ID": "CANARY"}}),
        (None, {"env": {"PASSPHRASE": "CANARY", "URL": "redis://:CANARY@h"}}),
        ({"SECRETS": ["CANARY", {"x": "CANARY"}], "passphrase": "CANARY"}, {"Env": {"SOME_KEY": "CANARY"}}),
    ],
)  # fmt: skip
def test_no_secret_of_any_form_is_shown(experiment, config):
    raw = message(experiment, config)
    assert "CANARY" in json.dumps(raw)
    assert "CANARY" not in shown(raw)


def test_a_secret_is_taken_out_wherever_else_it_occurs():
    raw = message(
        {
            "args": ["--x=hunter2hunter2"],
            "artifacts": {
                "a": {"credentials": {"aws": {"access_key": "AKAKAK", "secret_key": "hunter2hunter2"}}}
            },
        }
    )
    assert redact(raw)["experiment"]["args"] == [f"--x={MARK}"]


def test_the_rest_stays_and_the_message_itself_is_not_changed():
    raw = example("a")
    copy = redact(raw)
    assert raw == example("a")
    assert copy["experiment"]["args"] == raw["experiment"]["args"]
    assert copy["config"]["env"] == {"PATH": "%PATH%:./bin"}
    assert copy["config"]["storage"]["endpoint"] == "http://minio.lan:9000"
    assert copy["experiment"]["artifacts"]["output"]["credentials"]["aws"]["secret_access_key"] == MARK


def test_the_literal_secrets_of_a_message():
    raw = message(
        {
            "artifacts": {
                "token_ids": {
                    "qualified": "s3://h/b/k",
                    "credentials": {"aws": {**PAIR, "region": "us-west-2"}},
                }
            }
        },
        {
            "env": {"WANDB_API_KEY": "CANARY-env", "PATH": "/bin"},
            "cloud": {"queue": {"rmq": "amqp://guest:guest@h"}},
            "q": "amqp://u:CANARY-url@h",
        },
    )
    assert secret_values(raw) == {
        "CANARY-access",
        "CANARY-secret",
        "CANARY-token",
        "CANARY-env",
        "CANARY-url",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_copy_reads_as_a_request_again(path):
    copy = redact(json.loads(path.read_bytes()))
    assert decode(json.dumps(copy).encode()).key == copy["experiment"]["key"]


@pytest.mark.parametrize("name", ["MY_KEY_1", "api_TOKEN", "DB_PASSWORD", "xSecretx", "WIFI_PASS", "MONKEY"])
def test_variables_with_telling_names_are_masked_even_when_short(name):
    assert redact(message(config={"env": {name: "x1", "PATH": "x1"}}))["config"]["env"] == {
        name: MARK,
        "PATH": "x1",
    }
