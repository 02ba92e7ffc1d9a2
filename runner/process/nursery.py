"""The warm parent of all supervisors: a fork of it costs a millisecond, a Python start dozens. Standard library only.

The daemon sends it a channel and an output file for each run; it hands them to a supervisor that it has forked ahead,
which talks with the daemon over that channel. A second copy of the channel is kept here until the supervisor has ended properly, or, when it was killed,
until the orphans that it left are killed as well: so the daemon sees the end of a channel only when nothing of the run
is left. Running supervisors do not need the nursery: when it is killed they go on.

Between the nursery and each supervisor stands a guard that only waits for it. So the parent's parent of a workload is its
own as well: one that kills it ends its own attempt, and nobody else's (DESIGN.md rule 3).

It is in a session of its own (a terminal's Ctrl-C is the daemon's to handle) and ends when the daemon and all
supervisors have.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
from typing import NoReturn

from runner.process import kernel, supervisor, tree

HELLO = b"h"  #: sent once, when supervisors can be asked for
_PAUSE_SECS = 0.02  #: between two rounds of killing orphans; before the next supervisor is forked ahead


class Nursery:
    """Serves one daemon over `control`, a SOCK_SEQPACKET socket: each packet carries a channel and an output file."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wakeup = kernel.Wakeup()
        self._poller = kernel.Poller(control.fileno(), self._wakeup.fd)
        self._spare: tuple[int, socket.socket] | None = (
            None  # a supervisor without a run yet, and how to give it one
        )
        self._channels: dict[int, int] = {}  # a supervisor's guard -> our copy of its channel
        self._lost: list[int] = []  # channels of killed supervisors whose orphans may still live

    def run(self) -> None:
        """Serve until the daemon is gone and nothing is left."""
        self._fork_spare()
        with contextlib.suppress(BrokenPipeError):  # gone already: the loop notices
            self._control.send(HELLO)
        serving = True
        while serving or self._channels or self._lost:
            ready = self._poller.wait(_PAUSE_SECS if self._lost or self._spare is None else None)
            if self._wakeup.fd in ready:
                self._wakeup.clear()
                self._reap()
            self._end_orphans()
            if self._control.fileno() in ready and not self._receive():
                self._poller.remove(self._control.fileno())
                serving = False
            if serving and not ready and self._spare is None:
                self._fork_spare()  # in a quiet moment: the run that took the last one is starting
        if self._spare is not None:
            pid, handle = self._spare
            handle.close()
            os.waitpid(pid, 0)

    def _receive(self) -> bool:
        """Give the run that is asked for to a supervisor; return False when the daemon is gone."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._control, 1, 2)
        except ConnectionResetError:
            return False
        if not packet:
            return False
        if len(fds) == 2:  # noqa: PLR2004 - fewer arrive when we are out of descriptors; the daemon asks again
            channel, output = fds
            if self._hand_over(channel, output):
                fds = [output]
        for fd in fds:
            os.close(fd)
        return True

    def _hand_over(self, channel: int, output: int) -> bool:
        while True:
            try:
                pid, handle = self._spare or self._fork_spare()
            except OSError as exc:
                supervisor.say(channel, {"exit": {"code": None, "error": supervisor.refused(exc, "fork")}})
                return False
            self._spare = None
            with handle, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # somebody has killed it
                socket.send_fds(handle, [b"r"], [channel, output])
                self._channels[pid] = channel
                return True

    def _fork_spare(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                ours.close()
                self._become_guard(theirs)
        self._spare = pid, ours
        return self._spare

    def _become_guard(self, handle: socket.socket) -> NoReturn:
        """Wait for a supervisor, and end as it does; it ends with us."""
        status = 1
        try:
            self._wakeup.close()
            self._control.close()
            for fd in (*self._channels.values(), *self._lost):  # held here, their ends would go unnoticed
                os.close(fd)
            guard = os.getpid()
            pid = os.fork()
            if pid == 0:
                _become_supervisor(handle, guard)
            kernel.set_name("runner-guard")
            handle.close()
            status = int(os.waitpid(pid, 0)[1] != 0)
        except BaseException:  # noqa: BLE001 - nothing may unwind into the nursery's loop of this copy
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._spare is not None and self._spare[0] == pid:
                self._spare[1].close()
                self._spare = None
            elif (channel := self._channels.pop(pid, None)) is None:
                continue  # an orphan
            elif status == 0:
                os.close(channel)
            else:
                self._lost.append(channel)

    def _end_orphans(self) -> None:
        """After a supervisor was killed: kill whatever is below us and is not a supervisor's."""
        if not self._lost:
            return
        spare = () if self._spare is None else (self._spare[0],)
        if orphans := tree.descendants(os.getpid(), frozenset((*self._channels, *spare))):
            tree.kill(orphans)
            return
        for channel in self._lost:
            os.close(channel)
        self._lost.clear()


def _become_supervisor(handle: socket.socket, guard: int) -> NoReturn:
    """Wait for a run over `handle`, and see to it to its very end; or to that of its guard."""
    status = 1
    try:
        kernel.die_with_parent()
        if os.getppid() != guard:
            os._exit(status)
        kernel.set_name("runner-run")
        spare = supervisor.Supervisor()
        packet, fds, _, _ = socket.recv_fds(handle, 1, 2)
        handle.close()
        if packet:
            channel, output = fds
            spare.run(channel, output)
        status = 0
    except BaseException:  # noqa: BLE001 - nothing may unwind into the loop that this is a copy of
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def main(control_fd: int) -> None:
    """Be the nursery of the daemon at the other end of `control_fd`."""
    os.set_inheritable(control_fd, False)  # noqa: FBT003 - takes no keyword
    kernel.set_name("runner-nursery")
    kernel.ignore_requests_to_end()
    kernel.become_subreaper()
    gc.freeze()  # forks share what is there now instead of copying it when they collect
    Nursery(socket.socket(fileno=control_fd)).run()
