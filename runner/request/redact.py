"""The copy of a request that may be shown: in metadata documents, manifests and dead letters (DESIGN.md rule 9)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from runner.telemetry.redact import MARK, names_secret, redact_value, secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Wider than for other names: experimenters name their variables as they like, and the value is of no use to a reader.
_SECRET_VARIABLE = re.compile("KEY|TOKEN|PASS|SECRET|CREDENTIAL|AUTH", re.IGNORECASE)
_PLAIN_MEMBERS = {"region", "region_name", "profile", "profile_name", "type", "endpoint", "bucket", "user"}
_URL_PASSWORD = re.compile(r"""://([^\s/:@"'<>]{0,256}):([^\s"'<>@]{1,256})@""")


def redact(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the message without its secrets: credentials of all forms, URL user-info, telling names and variables.

    A secret value is taken out wherever else it occurs in the message too (arguments, requirement lines).
    """
    with secrets.known(secret_values(raw)):
        redacted: dict[str, Any] = redact_value(_with_variables_masked(raw))
    return redacted


def secret_values(raw: Mapping[str, Any]) -> frozenset[str]:
    """The literal secrets in the message, to be known to `telemetry.redact.secrets` while its experiment runs.

    Regions and the like beside them are none; nor is a password that equals its user name: masking words such as
    "guest" everywhere would hide more than it protects.
    """
    found: set[str] = set()
    _collect(raw, found, inside=False)
    return frozenset(found)


def _collect(value: Any, found: set[str], *, inside: bool) -> None:
    if isinstance(value, str):
        if inside:
            found.add(value)
        elif "://" in value:
            found.update(password for user, password in _URL_PASSWORD.findall(value) if password != user)
    elif isinstance(value, dict):
        for name, member in value.items():
            if not isinstance(member, str | dict | list):
                continue
            lower = name.lower()
            if lower == "artifacts" and isinstance(member, dict):
                _collect([*member.values()], found, inside=inside)  # tags are the experimenter's words
            else:
                plain = lower in _PLAIN_MEMBERS
                _collect(member, found, inside=not plain and (inside or names_secret(name)))
    elif isinstance(value, list):
        for member in value:
            _collect(member, found, inside=inside)


def _with_variables_masked(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        top: {name: _masked(member) if name.lower() == "env" else member for name, member in config.items()}
        if top.lower() == "config" and isinstance(config, dict)
        else config
        for top, config in raw.items()
    }


def _masked(env: Any) -> Any:
    if not isinstance(env, dict):
        return env
    return {name: MARK if value and _SECRET_VARIABLE.search(name) else value for name, value in env.items()}
