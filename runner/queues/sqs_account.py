"""What is needed to reach one AWS account's queues in one region, and how botocore is kept to exactly that.

Left to itself botocore looks for credentials, regions and endpoints in the environment, in the home directory and at the
metadata service of the machine. An account that names its keys or files gets nothing from there: credentials that an
operator did not drop are not ours to use (DESIGN.md rule 9). Only `ambient` opens that chain.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEFAULT_REGION = "us-west-2"  #: where nothing names one (INTEROP.md 2.5)
_SURROUNDINGS = ("env", "container-role", "iam-role", "boto-config", "ec2-credentials-file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqsKeys:
    """An access key. Never shows its secrets."""

    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqsProfile:
    """A profile of AWS's own two files. They are read when the account is first used, and again when AWS refuses what they said."""

    credentials_file: Path
    config_file: Path
    name: str = "default"

    def written(self) -> tuple[tuple[int, int, int], ...] | None:
        """What changes when somebody writes or replaces a file; None when one is missing."""
        try:
            found = [path.stat() for path in (self.credentials_file, self.config_file)]
        except OSError:
            return None
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqsAccount:
    """One account in one region. Exactly one of `keys`, `profile` and `ambient` says where the credentials are.

    Raises `errors.UsageError` otherwise.
    """

    label: str  #: for logs, metrics and the state directory, without credentials; the same after a restart
    region: str = ""  #: empty: what the profile or the environment says, else `DEFAULT_REGION`
    keys: SqsKeys | None = None
    profile: SqsProfile | None = None
    ambient: bool = False  #: AWS's own chain: environment, home directory, metadata service
    endpoint_url: str | None = None  #: another address than AWS's: for tests and look-alikes

    def __post_init__(self) -> None:
        if (self.keys is not None) + (self.profile is not None) + self.ambient != 1:
            raise errors.UsageError(
                f"{self.label}: name either an access key, a profile, or the ambient credentials"
            )


class Connector:
    """Makes botocore's clients for an account. Blocking: reads the account's files, and imports botocore (0.4 s)."""

    def __init__(self, account: SqsAccount) -> None:
        """Raises botocore's errors for files and profiles that cannot be used."""
        from botocore import session as botocore_session

        self._account = account
        if account.ambient:
            self._session = botocore_session.Session()
        else:
            self._session = botocore_session.Session(
                profile=account.profile.name if account.profile else None,
                session_vars=_no_surroundings(account.profile),
            )
            resolver = self._session.get_component("credential_provider")
            for name in _SURROUNDINGS:
                resolver.remove(name)
        configured = self._session.get_scoped_config()
        self.region: str = account.region or self._session.get_config_variable("region") or DEFAULT_REGION
        self._endpoint = account.endpoint_url or (None if account.ambient else configured.get("endpoint_url"))

    def client(self, **config: Any) -> Any:
        """A client for SQS; `config` is botocore's own."""
        from botocore.config import Config

        keys = self._account.keys
        return self._session.create_client(
            "sqs",
            region_name=self.region,
            endpoint_url=self._endpoint,
            aws_access_key_id=keys.access_key if keys else None,
            aws_secret_access_key=keys.secret_key if keys else None,
            aws_session_token=keys.session_token if keys else None,
            # The environment's AWS_ENDPOINT_URL concerns only who asked for the environment.
            config=Config(ignore_configured_endpoint_urls=not self._account.ambient, **config),
        )


def _no_surroundings(profile: SqsProfile | None) -> Mapping[str, tuple[str | None, None, object, None]]:
    """Session variables of botocore that are taken from nowhere but here: (in file, in environment, value, conversion)."""
    return {
        "profile": (None, None, None, None),
        "region": ("region", None, None, None),
        "config_file": (None, None, str(profile.config_file) if profile else os.devnull, None),
        "credentials_file": (None, None, str(profile.credentials_file) if profile else os.devnull, None),
    }
