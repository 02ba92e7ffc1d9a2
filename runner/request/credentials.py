"""Storage credentials in every form that messages carry them (INTEROP.md 1.6)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from runner.request import wire
from runner.request.model import KeyPair

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNEXPANDED = re.compile(r"\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\}")
_OTHER_KINDS = {"plain", "jwt"}


def key_pair(value: Any, notes: wire.Notes) -> KeyPair | None:
    """The pair in a `credentials` member; None when there is none, and the caller looks further.

    None stands for null, `"none"`, `{}`, `{"null": ...}`, and for two empty strings: those ask for anonymous access, which is
    what the search ends with when nothing else is found. A variable that the client did not expand ("$AWS_ACCESS_KEY_ID"),
    half a pair, and kinds that open no S3 store are None with a note.
    """
    if not isinstance(value, dict):
        if isinstance(value, str) and _UNEXPANDED.fullmatch(value):
            notes.add("credentials", "is a variable that the client did not expand; taken as absent")
        elif value is not None and value not in ("", "none"):
            notes.add("credentials", f"is {wire.kind_of(value)} that holds no key pair; taken as absent")
        return None
    kinds = {name.lower(): member for name, member in value.items()}
    if "aws" in kinds:
        return _from_aws(kinds["aws"], notes.at("credentials.aws"))
    if kinds.keys() & _OTHER_KINDS:
        notes.add("credentials", "is of a kind that opens no S3 store; taken as absent")
    return None if "null" in kinds else _from_aws(value, notes.at("credentials"))


def key_pair_beside(endpoint: Mapping[str, Any], notes: wire.Notes) -> KeyPair | None:
    """The old style: `aws_access_key` and `aws_secret_key` straight in `storage` or `database`."""
    return _from_aws(dict(endpoint), notes)


def _from_aws(value: Any, notes: wire.Notes) -> KeyPair | None:
    aws = wire.Credentials.read(value, notes)
    return _checked(
        access=aws.access_key or aws.access_key_id or aws.aws_access_key or aws.aws_access_key_id,
        secret=aws.secret_access_key or aws.secret_key or aws.aws_secret_access_key or aws.aws_secret_key,
        token=aws.session_token or aws.aws_session_token,
        region=aws.region or aws.region_name,
        notes=notes,
    )


def _checked(
    *, access: str | None, secret: str | None, token: str | None, region: str | None, notes: wire.Notes
) -> KeyPair | None:
    if not access and not secret:
        return None
    if not access or not secret:
        notes.add(
            "secret_access_key" if access else "access_key", "is missing; half a key pair is taken as absent"
        )
        return None
    if _UNEXPANDED.fullmatch(access) or _UNEXPANDED.fullmatch(secret):
        notes.lines.append(f"{notes.where} holds a variable that the client did not expand; taken as absent")
        return None
    return KeyPair(access_key=access, secret_key=secret, session_token=token or None, region=region or None)
