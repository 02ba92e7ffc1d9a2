from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from runner import errors
from runner.request.envelope import find
from tests.unit.request.messages import decode, message


def b64(count):
    return base64.b64encode(bytes(count)).decode()


def body(payload, **rest):
    return json.dumps({"message": {"payload": payload, "time_added": None, **rest}}).encode()


@pytest.mark.parametrize(
    "payload", [f"{b64(128)},{b64(40)}", f"{b64(512)},{b64(4000)}", f" {b64(256)},{b64(41)}\n"]
)
def test_a_well_formed_envelope_is_for_another_host(payload):
    with pytest.raises(errors.NoKey):
        decode(body(payload, signature="x", resources_needed={"cpus": 1}))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ("", "no comma"), (b64(512), "no comma"), (",", "key part"), (f"{b64(127)},{b64(40)}", "key part .* 127 bytes"),
        (f"{b64(128)},{b64(39)}", "cipher part .* 39 bytes"), (f"{b64(128)},", "cipher part"), (f"@@@@,{b64(40)}", "key part .* not Base64"),
        (f"{b64(128)},{b64(40)[:-1]}", "cipher part .* not Base64"), (f"{b64(128)},{b64(40)},{b64(40)}", "cipher part .* not Base64"),
        (f"{b64(128)},é", "cipher part .* not Base64"),
    ],
)  # fmt: skip
def test_a_broken_envelope_is_malformed(payload, words):
    with pytest.raises(errors.MalformedMessage, match=words):
        decode(body(payload))


@pytest.mark.parametrize("other", [None, "text", {}, {"payload": None}, {"payload": {"a": 1}}, []])
def test_without_a_payload_it_is_a_plain_request(other):
    assert decode(json.dumps({**message(), "message": other}).encode()).key == "k1"


def test_the_parts_of_the_documented_vector():
    cipher = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXwsIKuwp2LtvMPkx7z1U5GSXdXTe3r9B51lnhSkq1Meov"
    found: Any = find({"payload": f"{b64(512)},{cipher}"})
    assert found.cipher[:24] == bytes(range(24))
    assert len(found.cipher) == len('{"experiment":{}}') + 40
    assert len(found.wrapped_key) == 512
    assert "AAEC" in found.payload
