"""The errors of Google's library, turned into `pubsub_wire`'s. Imports the library."""

from __future__ import annotations

from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.rpc import error_details_pb2

from runner.queues import pubsub_wire as wire

DETAIL_CHARS = 200  #: of the service's own words, so much is told

#: what a call of the library may raise
ERRORS = (exceptions.GoogleAPICallError, auth_exceptions.GoogleAuthError)

_REFUSALS = (
    exceptions.Unauthenticated,
    exceptions.PermissionDenied,
    exceptions.FailedPrecondition,
    exceptions.InvalidArgument,
)


def translated(error: Exception, *, lease: bool = False) -> wire.WireError:
    """Our error for one of the library's; `lease`: the call was about an ack id."""
    if isinstance(error, exceptions.NotFound):
        return wire.Missing(_text(error))
    if isinstance(error, exceptions.GoogleAPICallError):
        if lease and _is_lapsed(error):
            return wire.Lapsed(_text(error))
        return wire.Away(_text(error), refused=isinstance(error, _REFUSALS))
    return wire.Away(
        type(error).__name__
    )  # of the authentication: its text may hold what a token server said


def _is_lapsed(error: exceptions.GoogleAPICallError) -> bool:
    """Whether the ack id will never be taken again. What ErrorInfo calls transient may be."""
    verdicts = [
        verdict
        for detail in error.details
        if isinstance(detail, error_details_pb2.ErrorInfo)
        for verdict in detail.metadata.values()
    ]
    if verdicts:
        return not any(verdict.startswith("TRANSIENT_") for verdict in verdicts)
    return isinstance(error, exceptions.InvalidArgument)


def _text(error: exceptions.GoogleAPICallError) -> str:
    code = error.grpc_status_code.name if error.grpc_status_code else type(error).__name__
    if "plugin" in error.message:  # the credentials could not be turned into a token
        return f"{code}: the credentials cannot be used"
    return f"{code}: {error.message[:DETAIL_CHARS]}"
