"""The HTTP port of a daemon, as its clients see it (DESIGN.md 5.10)."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
from typing import TYPE_CHECKING, Any

import orjson

from runner import errors

if TYPE_CHECKING:
    from pathlib import Path

#: Where a daemon writes down where it answers, in its working directory.
ADDRESS_FILE = "studio-runner.json"
_TIMEOUT_SECS = 10.0
#: For what it has to ask a broker for, which has 15 seconds.
_POST_SECS = 30.0


class Away(errors.RunnerError):
    """No daemon answers. It may be starting again."""


class Missing(errors.RunnerError):
    """The daemon knows no such thing."""


class Declined(errors.RunnerError):
    """The daemon cannot do that, and says why; it may well do other things."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Daemon:
    """A daemon, by its address or by its working directory: then it is found again after a restart."""

    address: str = ""  #: host:port
    working_dir: Path | None = None
    token: str | None = dataclasses.field(default=None, repr=False)

    def where(self) -> str:
        """host:port. Raises `Away` when nobody has written down one."""
        if self.address:
            return self.address.removeprefix("http://").rstrip("/")
        if self.working_dir is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return str(orjson.loads((self.working_dir / ADDRESS_FILE).read_bytes())["address"])
        raise Away(
            f"no daemon works in {self.working_dir}: start one, or name it by --working-dir or --address"
        )

    def get(self, path: str) -> bytes:
        """What it answers. Blocking, for some seconds at the most.

        Raises:
            Away: it does not answer, or not like a daemon.
            Missing: there is no such page.
            errors.UsageError: it wants a token, or another one.
        """
        return self._ask("GET", path)

    def post(self, path: str) -> Any:
        """Ask it to do something; its answer, parsed. Raises as `get`, and `Declined`."""
        return self._parsed(self._ask("POST", path, _POST_SECS))

    def _ask(self, method: str, path: str, secs: float = _TIMEOUT_SECS) -> bytes:
        where = self.where()
        try:
            connection = http.client.HTTPConnection(where, timeout=secs)
            with contextlib.closing(connection):
                headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
                connection.request(method, path, headers=headers)
                answer = connection.getresponse()
                content = answer.read()
        except (OSError, http.client.HTTPException) as exc:
            raise Away(f"the daemon at {where} does not answer: {exc}") from exc
        match answer.status:
            case 200:
                return content
            case 401 | 403:
                raise errors.UsageError(f"the daemon at {where} wants a token: --token, or HTTP_TOKEN")
            case 404:
                raise Missing(_reason(content) or f"the daemon at {where} has no {path}")
            case 409:
                raise Declined(_reason(content) or f"the daemon at {where} cannot do that now")
            case status:
                raise Away(_reason(content) or f"the daemon at {where} answers with status {status}")

    def get_json(self, path: str) -> Any:
        """The same, parsed."""
        return self._parsed(self.get(path))

    def _parsed(self, content: bytes) -> Any:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as exc:
            raise Away(f"what answers at {self.where()} is no daemon") from exc


def _reason(content: bytes) -> str:
    """The sentence with which a daemon refuses; empty when it is not one of a daemon's."""
    with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
        return str(orjson.loads(content)["error"])
    return ""
