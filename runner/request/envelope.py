"""The encrypted envelope around a message (INTEROP.md 6.1, 6.2): recognised and checked here, opened with a key elsewhere."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from typing import Any

from runner import errors

_MIN_KEY_BYTES = 128  # an RSA modulus of 1024 bits; DESIGN.md 5.8
_MIN_CIPHER_BYTES = 40  # nonce (24) and tag (16) around nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Envelope:
    """An encrypted request; well-formed, but neither decrypted nor its signature checked."""

    payload: str  #: the text that a signature is over
    wrapped_key: bytes = dataclasses.field(repr=False)  #: the message key under the receiver's RSA key (OAEP)
    cipher: bytes = dataclasses.field(repr=False)  #: nonce (24 bytes) and secretbox


def find(message: Any) -> Envelope | None:
    """The envelope in the top-level `message` member; None when it is no envelope.

    Raises errors.MalformedMessage when it is one whose payload is not `K,C` in Base64, or too short to hold anything.
    """
    payload = message.get("payload") if isinstance(message, dict) else None
    if not isinstance(payload, str):
        return None
    wrapped, comma, cipher = payload.strip().partition(",")
    if not comma:
        raise errors.MalformedMessage(
            "the payload of the envelope has no comma between its key and its cipher part"
        )
    return Envelope(
        payload=payload,
        wrapped_key=_decoded(wrapped, "key", _MIN_KEY_BYTES),
        cipher=_decoded(cipher, "cipher", _MIN_CIPHER_BYTES),
    )


def _decoded(text: str, part: str, least: int) -> bytes:
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as bad:
        raise errors.MalformedMessage(f"the {part} part of the envelope is not Base64") from bad
    if len(decoded) < least:
        raise errors.MalformedMessage(
            f"the {part} part of the envelope is {len(decoded)} bytes; it cannot be shorter than {least}"
        )
    return decoded
