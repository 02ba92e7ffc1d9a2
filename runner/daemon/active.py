"""A run in progress, as the daemon sees it: its message, its part of the machine, its queue."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from runner.daemon.queuestate import QueueState
    from runner.daemon.runstate import RunState
    from runner.experiment.lifecycle import Experiment
    from runner.queues.base import Delivery, QueueBackend
    from runner.request.model import Request
    from runner.resources.allocator import Allocation


@dataclasses.dataclass(kw_only=True, eq=False)
class Active:
    """A run in progress and the delivery that its outcome will end."""

    queue: QueueState
    delivery: Delivery
    request: Request
    experiment: Experiment
    state: RunState
    backend: QueueBackend | None = None  #: that of its delivery; a queue may get another one while it runs
    allocation: Allocation | None = None  #: its part of the machine, until it gives that back
    since: float = dataclasses.field(default_factory=time.monotonic)
    resting: bool = False  #: of that part it has only the disk left
    settling: bool = False  #: its delivery is being ended: what comes again from now on is no copy of it
    task: asyncio.Task[None] | None = None

    @property
    def attempt(self) -> int:
        """Its number, from 1."""
        return self.state.attempt

    @property
    def started(self) -> float:
        """Unix time."""
        return self.state.started

    def move(self, queue: QueueState, delivery: Delivery) -> None:
        """Its message is that delivery from now on, which may have come by another account of the same queue."""
        before, self.queue = self.queue, queue
        for state, number in ((before, -1), (queue, 1)):  # which may be one
            state.running += number
            state.holding += number if self.allocation is not None and not self.resting else 0
        self.delivery, self.backend = delivery, queue.backend
        before.changed()

    def rest(self) -> None:
        """Its workload is over: it keeps the disk of its part of the machine. Idempotent."""
        if self.allocation is not None and not self.resting:
            self._used(self.allocation)
            self.resting = True
            self.allocation.keep_disk()

    def release(self) -> None:
        """Give its part of the machine back. Idempotent."""
        if self.allocation is not None:
            allocation, self.allocation = self.allocation, None
            if not self.resting:
                self._used(allocation)
            self.resting = False
            allocation.release()

    def _used(self, allocation: Allocation) -> None:
        # Before it is known who gets it: that depends on what its queue has had.
        self.queue.used(allocation.amounts.cpus * (time.monotonic() - self.since))
