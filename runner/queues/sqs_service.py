"""The calls of SQS that the backend makes, blocking, with our errors instead of botocore's (imported when first used).

A wrong credential, a server that is away and one that is overloaded are all `errors.QueueUnavailable`: the account cannot be
used now. No text of an error holds a secret: what AWS answers to a wrong signature quotes the request, so it is not shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from runner import errors
from runner.queues import base, sqs_account
from runner.queues.sqs_access import clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MOST_BYTES = (
    1 << 20
)  #: of a message, attributes included; a queue may be set to less (256 KiB, once the most)
ATTEMPTS_ATTRIBUTE = "studio-runner.attempts"  #: on messages that were sent again by a runner

_CONNECT_SECS = 5.0
_PAGE = 1000  # queues a request: SQS's limit
_DELAY_SECS = 900  # SQS's limit for a message that is sent
_SHOWN = 300  # characters of what SQS says
_GONE = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"})
_LOST = frozenset(
    {"ReceiptHandleIsInvalid", "MessageNotInflight", "AWS.SimpleQueueService.MessageNotInflight"}
)
_INVALID = frozenset({"InvalidMessageContents", "InvalidParameterValue", "MissingParameter"})
_TOO_LONG = "beyond the limit"  # 12 hours; told as InvalidParameterValue
_NO_MESSAGE = "not available for visibility"  # purged, or its retention is over; told as that, too
_REFUSED = {
    "InvalidClientTokenId": "AWS does not know this access key",
    "InvalidAccessKeyId": "AWS does not know this access key",
    "UnrecognizedClientException": "AWS does not know this access key or session token",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "InvalidSignatureException": "the secret key is wrong, or the clock of this machine is",
    "IncompleteSignature": "the access key or its region cannot be used in a signature",
    "RequestExpired": "the clock of this machine is wrong",
    "ExpiredToken": "the session token has expired",
    "ExpiredTokenException": "the session token has expired",
    "InvalidSecurity": "AWS refuses the credentials",
    "MissingAuthenticationToken": "AWS refuses the credentials",
}
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "AuthorizationError"})
_XML = re.compile(r"<Code>([^<]+)</Code>\s*<Message>([^<]*)</Message>")
#: What SQS carries is text, of the characters that XML 1.0 allows.
_NO_TEXT = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class AccountRefused(errors.QueueUnavailable):
    """Somebody answered and will not have us: asking again soon is no use."""


class HoldLost(Exception):  # noqa: N818 - a state of the message
    """The receipt handle holds the message no more."""


class HoldAtItsEnd(Exception):  # noqa: N818 - a state of the message
    """SQS lets nobody hold the message any longer (12 hours since it was received)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Received:
    """A message that SQS has handed to us."""

    body: str
    handle: str
    receives: int  #: how often it was handed out, this time included
    attempts: int | None  #: of a message that a runner has sent again; None for those of clients
    group: str | None  #: the MessageGroupId, on FIFO queues


class Service:
    """One account's SQS. Thread-safe; every call ends within a bounded time: `call_secs`, and one repeat where that is safe."""

    def __init__(
        self, account: sqs_account.SqsAccount, *, call_secs: float, poll_secs: float, at_once: int
    ) -> None:
        """`at_once` calls of each kind keep their connections."""
        self._account = account
        self._call_secs = call_secs
        self._poll_secs = poll_secs
        self._at_once = at_once
        self._making = threading.RLock()
        self._clients: tuple[Any, Any] | None = None
        self._written: object = None  #: of the files that the clients were made of
        self._urls: dict[str, str] = {}
        self.identity = (
            ""  #: of the account, in its region, at its endpoint; empty before it has listed a queue
        )
        self.filled: dict[
            str, float
        ] = {}  #: queue -> when a message last became visible in it by us (`clock`)

    def names(self) -> list[str]:
        """Every queue of the account; a request per thousand."""
        found = self._names()
        if found and not self.identity:
            meta, owner = self._once().meta, self._urls[found[0]].split("/")[-2]
            self.identity = f"sqs://{urlsplit(meta.endpoint_url).netloc}/{meta.region_name}/{owner}"
        there = frozenset(found)
        # Queues come and go for years, with names that never come again.
        self._urls = {name: url for name, url in self._urls.copy().items() if name in there}
        self.filled = {name: when for name, when in self.filled.copy().items() if name in there}
        return found

    def is_listed(self, name: str) -> bool:
        """Whether the account's list has a queue of exactly that name."""
        return name in self._names(name)

    def is_found(self, name: str) -> bool:
        """Whether a queue of that name is found. SQS says no as well where only the permission is missing."""
        self._urls.pop(name, None)
        with contextlib.suppress(base.QueueGone, AccountRefused):
            self._url(name)
            return True
        return False

    def receive(self, name: str, *, wait_secs: int, visibility_secs: int) -> Received | None:
        """Wait up to `wait_secs` for one message, which is ours for `visibility_secs` from when SQS chose it."""
        url = self._url(name)
        with self._translated(name):
            answer = self._once().receive_message(
                QueueUrl=url,
                MaxNumberOfMessages=1,
                WaitTimeSeconds=wait_secs,
                VisibilityTimeout=visibility_secs,
                MessageSystemAttributeNames=["ApproximateReceiveCount", "MessageGroupId"],
                MessageAttributeNames=[ATTEMPTS_ATTRIBUTE],
            )
        for message in self._checked(answer).get("Messages", ()):
            system = message.get("Attributes", {})
            attempts = message.get("MessageAttributes", {}).get(ATTEMPTS_ATTRIBUTE, {}).get("StringValue")
            return Received(
                body=message["Body"],
                handle=message["ReceiptHandle"],
                receives=int(system.get("ApproximateReceiveCount", 1)),
                attempts=int(attempts) if attempts is not None and attempts.isdecimal() else None,
                group=system.get("MessageGroupId"),
            )
        return None

    def hold(self, name: str, handle: str, secs: float) -> None:
        """Hide the message for so long from now; 0 gives it back. Raises `HoldLost` or `HoldAtItsEnd`."""
        url = self._url(name)
        with self._translated(name):
            answer = self._repeated().change_message_visibility(
                QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=math.ceil(secs)
            )
        self._checked(answer)
        if secs <= 0:
            self.filled[name] = clock()

    def delete(self, name: str, handle: str) -> None:
        """Remove the message. Raises `HoldLost` where SQS says so; standard queues do not tell of an old handle."""
        url = self._url(name)
        with self._translated(name):
            answer = self._repeated().delete_message(QueueUrl=url, ReceiptHandle=handle)
        self._checked(answer)

    def send(
        self,
        name: str,
        body: str,
        *,
        attempts: int | None = None,
        group: str | None = None,
        delay_secs: float = 0,
    ) -> None:
        """Put a message at the end, once: what got no answer is not sent again. Raises `errors.MalformedMessage`.

        On a FIFO queue without a `group` the message is a group of its own, so that it holds up no other; its deduplication
        id is new each time, since the same bytes sent anew are meant (LEASE.md). Delays are up to 900 s, none on FIFO.
        """
        more: dict[str, Any] = {}
        if name.endswith(".fifo"):
            more |= {"MessageGroupId": group or uuid4().hex, "MessageDeduplicationId": uuid4().hex}
        elif delay_secs > 0:
            more["DelaySeconds"] = min(_DELAY_SECS, math.ceil(delay_secs))
        if attempts is not None:
            more["MessageAttributes"] = {
                ATTEMPTS_ATTRIBUTE: {"DataType": "Number", "StringValue": str(attempts)}
            }
        url = self._url(name)
        with self._translated(name, sending=True):
            answer = self._once().send_message(QueueUrl=url, MessageBody=body, **more)
        self._checked(answer, "MessageId")
        self.filled[name] = clock()

    def close(self) -> None:
        """Close the idle connections. Calls under way end by themselves; what a poll still brings can be given back.

        The clients stay: the account's files may be gone, with the account.
        """
        with self._making:
            for client in self._clients or ():
                client.close()

    def _names(self, prefix: str = "") -> list[str]:
        found: list[str] = []
        more: dict[str, Any] = {"QueueNamePrefix": prefix} if prefix else {}
        while True:
            with self._translated(prefix):
                answer = self._repeated().list_queues(MaxResults=_PAGE, **more)
            for url in self._checked(answer).get("QueueUrls", ()):
                name = url.rpartition("/")[2]
                self._urls[name] = url
                found.append(name)
            if not (token := answer.get("NextToken")):
                return found
            more["NextToken"] = token

    def _url(self, name: str) -> str:
        url = self._urls.get(name)
        if url is None:
            with self._translated(name):
                answer = self._repeated().get_queue_url(QueueName=name)
            url = self._urls[name] = str(self._checked(answer, "QueueUrl")["QueueUrl"])
        return url

    def _checked(self, answer: Mapping[str, Any], *members: str) -> Mapping[str, Any]:
        """The answer, if it can be one of SQS's: botocore reads any page with status 200 as an empty one."""
        kind = answer["ResponseMetadata"]["HTTPHeaders"].get("content-type", "json")
        if "json" not in kind or any(member not in answer for member in members):
            raise self._unavailable("something answers there that is not SQS")
        return answer

    def _once(self) -> Any:
        """For what must not be repeated unasked (a send, a poll with its long wait)."""
        return self._both()[0]

    def _repeated(self) -> Any:
        """For what may be."""
        return self._both()[1]

    def _both(self) -> tuple[Any, Any]:
        with self._making:
            if self._clients is None:
                # They tell every request, headers and session token included, at "debug".
                logging.getLogger("botocore").setLevel(logging.WARNING)
                with self._translated(""):
                    self._written = self._now_written()
                    connector = sqs_account.Connector(self._account)
                    common: Mapping[str, Any] = {
                        "connect_timeout": _CONNECT_SECS,
                        "max_pool_connections": self._at_once,
                        "tcp_keepalive": True,
                    }
                    self._clients = (
                        connector.client(
                            read_timeout=self._poll_secs + self._call_secs,
                            retries={"mode": "standard", "total_max_attempts": 1},
                            **common,
                        ),
                        connector.client(
                            read_timeout=self._call_secs / 2,
                            retries={"mode": "standard", "total_max_attempts": 2},
                            **common,
                        ),
                    )
            return self._clients

    def _now_written(self) -> object:
        return self._account.profile.written() if self._account.profile else None

    def _read_again(self) -> None:
        """The next call reads the account's files, if they are others by now: keys are rotated while messages are held.

        Files that are gone leave what was read: the account was removed, and its runs go on to their end.
        """
        now = self._now_written()
        with self._making:
            if now is not None and now != self._written:
                self._clients = None

    @contextlib.contextmanager
    def _translated(self, queue: str, *, sending: bool = False) -> Iterator[None]:
        from botocore import exceptions

        try:
            yield
        except exceptions.ClientError as error:
            code, said = _told(error.response.get("Error", {}))
            if code in _GONE:
                self._urls.pop(queue, None)
            elif code in _REFUSED:
                self._read_again()
            raise self._meaning(
                code,
                said,
                int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
                queue,
                sending=sending,
            ) from error
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            self._read_again()
            raise self._refused("there is no complete access key in its credentials") from error
        except exceptions.ProfileNotFound as error:
            raise self._refused(f"its files have no profile {self._profile_name()!r}") from error
        except (exceptions.ConfigParseError, exceptions.CredentialRetrievalError) as error:
            raise self._refused(str(error)) from error
        except (exceptions.BotoCoreError, exceptions.HTTPClientError) as error:
            raise self._unavailable(str(error)) from error
        except (ValueError, OSError) as error:  # a bad endpoint or region; files that cannot be read
            raise self._refused(f"its settings cannot be used: {type(error).__name__}: {error}") from error

    def _meaning(  # noqa: PLR0911 - a table
        self, code: str, said: str, status: int, queue: str, *, sending: bool
    ) -> Exception:
        if code in _GONE:
            return base.QueueGone(queue)
        if code in _LOST:
            return HoldLost(queue)
        if code in _INVALID:
            if _TOO_LONG in said:
                return HoldAtItsEnd(queue)
            if "expired" in said or _NO_MESSAGE in said:  # the receipt handle; its message
                return HoldLost(queue)
            if sending:
                return errors.MalformedMessage(f"SQS does not take this message for {queue}: {said}")
        if code in _REFUSED:
            return self._refused(f"{_REFUSED[code]} ({code})")
        if code in _DENIED:
            return self._refused(f"these credentials do not allow it: {said}")
        if code.lower().startswith("kms") and "throttl" not in code.lower():
            return self._refused(f"the key that encrypts {queue} cannot be used: {said} ({code})")
        return self._unavailable(f"{code or 'no reason given'} (status {status}) {said}")

    def _profile_name(self) -> str:
        return self._account.profile.name if self._account.profile else ""

    def _refused(self, text: str) -> AccountRefused:
        return AccountRefused(f"{self._account.label}: {text}", endpoint=self._account.label)

    def _unavailable(self, text: str) -> errors.QueueUnavailable:
        return errors.QueueUnavailable(f"{self._account.label}: {text}", endpoint=self._account.label)


def _told(error: Mapping[str, Any]) -> tuple[str, str]:
    """The code and the words of an answer. Look-alikes answer some questions in XML, where AWS does not."""
    code, said = str(error.get("Code", "")), " ".join(str(error.get("Message", "")).split())
    if found := _XML.search(said):
        code, said = found.groups()
    return code, said[:_SHOWN]


def text_of(body: bytes) -> str:
    """The body as SQS takes it. Raises `errors.MalformedMessage` when it is too large, empty, or no text."""
    if len(body) > MOST_BYTES:
        raise errors.MalformedMessage(
            f"the message has {len(body)} bytes; SQS takes {MOST_BYTES} at the most: upload what is large as an artifact"
        )
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or _NO_TEXT.search(text):
        raise errors.MalformedMessage("the message is empty or binary; SQS carries text only")
    return text
