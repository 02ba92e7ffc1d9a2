"""Every error of the runner, in one tree. The class decides what becomes of the message, and of the process.

::

    RunnerError
    ├── UsageError                exit 2   an option or a file of the operator's is wrong
    ├── Refused                   REJECT   the message itself can never run: dead-lettered
    │   ├── MalformedMessage               not JSON, not a request, too large
    │   ├── UnsupportedRequest             asks for what no attempt can give
    │   └── ArchiveRefused                 a hostile or damaged archive
    ├── AttemptFailed             REQUEUE  counts as one of the attempts; after the last, REJECT
    │   ├── ArtifactFailed                 missing, forbidden or not what it says
    │   ├── EnvironmentFailed              the Python environment cannot be built
    │   ├── DiskFailed                     this machine's disk is full, or broken
    │   ├── GpuFailed                      a card that the run had has failed
    │   └── ProcessLost                    the supervisor of a run was killed
    ├── Unreachable               REQUEUE  not an attempt: the other side is away; intake from it pauses
    │   ├── QueueUnavailable
    │   └── StorageUnavailable
    ├── NoCapacity                REQUEUE  not an attempt: not now
    └── NotForThisHost            REQUEUE  not an attempt: another host may; retried rarely
        ├── NeverFits                      asks for more than this machine has
        ├── NoKey                          encrypted for a key that is not installed here
        └── NoEngine                       wants a container, and there is no engine (or image) for it here
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Fate(enum.Enum):
    """What becomes of a message. Exactly one of them ends each delivery."""

    ACK = "ack"  #: its outcome is durable; the broker may forget it
    REQUEUE = "requeue"  #: someone may try again
    REJECT = (
        "reject"  #: never again: a copy with the reason goes to the dead letters, then it is acknowledged
    )


class Reason(enum.StrEnum):
    """Why a run ended as it did; the closed list behind `studioml.reason` and the `reason` label of metrics."""

    EXIT = "exit"  #: the workload ended by itself; its exit code says how
    SIGNAL = "signal"  #: the workload died of a signal that the runner did not send
    EXPIRED = "expired"  #: the experiment's lifetime was over before or while it ran
    TIMEOUT = "timeout"  #: it ran for its `max_duration`
    OOM = "oom"  #: it ran out of memory
    DISK = "disk"  #: it ran out of disk
    GPU = "gpu"  #: a card that it had has disappeared or has memory errors; it goes back to its queue
    CANCELLED = "cancelled"  #: stopped by its user
    QUEUE_DELETED = "queue-deleted"  #: stopped by deleting its queue
    LEASE_LOST = "lease-lost"  #: another runner may have it; this copy stopped
    DRAINED = "drained"  #: the runner was told to stop; the message went back to its queue
    MALFORMED = "malformed"  #: the message cannot be read
    UNSUPPORTED = "unsupported"  #: the message asks for what cannot be had
    ARTIFACT = "artifact"  #: an input is missing, forbidden, or not what it says
    ARCHIVE = "archive"  #: an archive is hostile or damaged
    ENVIRONMENT = "environment"  #: its Python environment cannot be built
    STORAGE = "storage"  #: a storage server does not answer
    QUEUE = "queue"  #: a broker does not answer
    CAPACITY = "capacity"  #: the machine is full
    NEVER_FITS = "never-fits"  #: it asks for more than this machine has
    NO_KEY = "no-key"  #: it is encrypted for a key that is not installed here
    NO_ENGINE = "no-engine"  #: it wants a container that this host cannot give
    ATTEMPTS = "attempts"  #: its attempts are used up
    RUNNER = "runner"  #: the runner itself failed


class RunnerError(Exception):
    """The root. Its text is one sentence for a person: what was wrong, where, and what to do."""

    fate: ClassVar[Fate] = Fate.REQUEUE
    counts: ClassVar[bool] = True  #: whether it uses up one of the message's attempts
    exit_code: ClassVar[int] = 1
    reason: ClassVar[Reason] = Reason.RUNNER


class UsageError(RunnerError):
    """An option, an environment variable or a file of the operator's is wrong. Exit code 2."""

    exit_code = 2


class Refused(RunnerError):
    """The message itself can never run, here or anywhere: it is dead-lettered with the reason."""

    fate = Fate.REJECT
    reason = Reason.UNSUPPORTED


class MalformedMessage(Refused):
    """Not JSON, not a request, or larger than a message may be."""

    reason = Reason.MALFORMED


class UnsupportedRequest(Refused):
    """A well-formed request for something that no attempt can give (no program, no such Python, ...)."""

    reason = Reason.UNSUPPORTED


class ArchiveRefused(Refused):
    """An archive that would write outside its directory, is damaged, or is a bomb."""

    reason = Reason.ARCHIVE


class AttemptFailed(RunnerError):
    """This attempt failed, another may not. After the last attempt the message is dead-lettered."""

    fate = Fate.REQUEUE


class ArtifactFailed(AttemptFailed):
    """An input is missing (404), forbidden (403) or not what it says."""

    reason = Reason.ARTIFACT


class EnvironmentFailed(AttemptFailed):
    """The Python environment cannot be built; the text ends with the builder's last lines."""

    reason = Reason.ENVIRONMENT


class DiskFailed(AttemptFailed):
    """The run's directory cannot be written or read: the disk is full, or broken."""

    reason = Reason.DISK


class GpuFailed(AttemptFailed):
    """A card that the run had has disappeared, or has uncorrected memory errors.

    It counts: what breaks a card on three machines is not to be let loose on a fourth.
    """

    reason = Reason.GPU


class ProcessLost(AttemptFailed):
    """The supervisor of a run vanished, and with it the knowledge of how the run ended."""

    reason = Reason.RUNNER


class Unreachable(RunnerError):
    """The other side does not answer (connect, time-out, 5xx). Never an attempt; work from it pauses.

    `endpoint` is its address without credentials.
    """

    counts = False
    reason = Reason.STORAGE

    def __init__(self, message: str, *, endpoint: str = "") -> None:
        super().__init__(message)
        self.endpoint = endpoint


class QueueUnavailable(Unreachable):
    """A broker does not answer. The only error that a queue backend raises for its connection."""

    reason = Reason.QUEUE


class StorageUnavailable(Unreachable):
    """A storage server does not answer, stalls, or answers with 5xx."""

    reason = Reason.STORAGE


class NoCapacity(RunnerError):
    """It fits this machine, but not now. `lacking` names what there is too little of."""

    counts = False
    reason = Reason.CAPACITY

    def __init__(self, message: str, *, lacking: str = "") -> None:
        super().__init__(message)
        self.lacking = lacking


class NotForThisHost(RunnerError):
    """Another host may run it: put back, and asked for again only rarely."""

    counts = False


class NeverFits(NotForThisHost):
    """It asks for more than this machine has in all."""

    reason = Reason.NEVER_FITS


class NoKey(NotForThisHost):
    """It is encrypted for a key that is not installed here."""

    reason = Reason.NO_KEY


class NoEngine(NotForThisHost):
    """It wants a container, and this host has no engine for it, or not the image and may not fetch it."""

    reason = Reason.NO_ENGINE
