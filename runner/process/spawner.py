"""The daemon's side: commands in, processes that can be waited for and stopped, exits out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.process import base, cgroups
from runner.process.tail import open_unlinked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START_SECS = 30.0  #: at most so long until a program runs
_CLOSE_GRACE_SECS = 3.0  #: between TERM and KILL for what still runs at `Spawner.aclose`
_CLOSE_SECS = 5.0  #: for the nursery to end by itself
_FULL_PAUSE_SECS = 0.005  #: until it is tried again; hundreds of starts are queued then
_ATTEMPTS = 3  #: nurseries that may be killed under one start

# The package is found by the directory it lies in, after the standard library and without site-packages.
_NURSERY = "import sys; sys.path.append(sys.argv[1]); from runner.process.nursery import main; main(int(sys.argv[2]))"
_PACKAGE_ROOT = str(Path(__file__).parents[2])
#: All that the nursery gets of our environment: what Python needs to start. The rest may be secret, and workloads of
#: the same user can read it in /proc.
_NURSERY_ENV = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE")

log = structlog.get_logger(__name__)


class Process:
    """A command that was started. Made by `Spawner.start`."""

    def __init__(self, channel: _Channel, program: str) -> None:
        self._channel = channel
        self._program = program

    @property
    def pid(self) -> int | None:
        """The workload's process id; None when it could not be started (`wait` tells why)."""
        return self._channel.pid

    @property
    def supervisor_pid(self) -> int | None:
        """The process id of its supervisor; None when not even that could be started."""
        return self._channel.supervisor_pid

    async def wait(self) -> base.ProcessExit:
        """Wait until it has ended and nothing of it is left. Any number may wait; cancelling a wait stops nothing.

        Raises `errors.ProcessLost` when its supervisor was killed; nothing of it is left then either.
        """
        await self._channel.ended.wait()
        if self._channel.exit is None:
            raise errors.ProcessLost(f"the supervisor of {self._program!r} has vanished")
        return self._channel.exit

    async def stop(self, grace_secs: float) -> base.ProcessExit:
        """TERM to all of its processes, KILL after the grace, repeated until none is left; then as `wait`.

        Idempotent; a later call can shorten the grace, never lengthen it. Cancelling it does not take it back.
        It has no limit of its own: a process that the kernel cannot kill (a dead disk) still holds what it was given.
        """
        self._channel.stop(grace_secs)
        return await self.wait()


class Spawner:
    """Starts commands, each below a supervisor of its own that is forked from a warm parent, the nursery.

    No threads, no signal handlers, no child watcher, and no forks of the daemon. Belongs to the loop that opened it.
    """

    def __init__(self) -> None:
        self._nursery: _Nursery | None = None
        self._lock = asyncio.Lock()  # one nursery at a time, one sender at a time
        self._running: set[_Channel] = set()

    async def open(self) -> None:
        """Start the nursery, so that the first start is as quick as every other.

        Raises `errors.RunnerError` when that cannot be done.
        """
        async with self._lock, asyncio.timeout(START_SECS):
            await self._living_nursery()

    async def start(self, command: base.Command) -> Process:
        """Start it; return when its program runs, or cannot: then `Process.wait` tells why in `ProcessExit.error`.

        Cancelling it stops what was started, with the command's own grace, and raises only when that has ended. Raises
        OSError when the output cannot be opened, `errors.ProcessLost` when the supervisor is killed before the program
        runs, `errors.RunnerError` when the nursery was lost and no other can be started.
        """
        return await self._start(command, command.grace_secs)

    async def _start(self, command: base.Command, grace_secs: float) -> Process:
        program = command.argv[0]
        for _ in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(START_SECS):
                    channel = await self._ask_for(command, grace_secs)
            except TimeoutError as exc:
                raise errors.ProcessLost(f"{program!r} did not start in {START_SECS:.0f} s") from exc
            if channel.pid is not None or channel.exit is not None:
                return Process(channel, program)
            if channel.supervisor_pid is not None:
                raise errors.ProcessLost(f"the supervisor of {program!r} vanished before the program ran")
            # The nursery was killed before it forked: nothing has run, so another one may be asked.
        raise errors.ProcessLost(f"no supervisor for {program!r}: its parent is killed again and again")

    async def run(
        self, command: base.Command, *, timeout_secs: float | None = None, grace_secs: float = 5
    ) -> base.ProcessExit:
        """Start it and wait for it. When the time is over it is stopped, and the exit says `stopped`.

        Cancelling it stops the command as well and raises when nothing of it is left; cancelling again kills at once.
        Raises what `start` and `Process.wait` raise.
        """
        process = await self._start(command, grace_secs)
        try:
            async with asyncio.timeout(timeout_secs):
                return await process.wait()
        except TimeoutError:
            await process._channel.outlast(grace_secs)  # noqa: SLF001 - ours
            return await process.wait()
        except asyncio.CancelledError:
            await process._channel.outlast(grace_secs)  # noqa: SLF001 - ours
            raise

    async def aclose(self) -> None:
        """End everything that still runs (TERM, 3 seconds, KILL), then the nursery. Idempotent.

        What cannot be killed is left to its supervisor after some seconds; those who wait for it see it lost.
        """
        running = list(self._running)
        for channel in running:
            channel.stop(_CLOSE_GRACE_SECS)
        try:
            async with asyncio.timeout(_CLOSE_GRACE_SECS + _CLOSE_SECS):
                for channel in running:
                    await channel.ended.wait()
        except TimeoutError:
            left = [channel.supervisor_pid for channel in running if not channel.ended.is_set()]
            for channel in running:
                channel.close()
            log.warning("processes left behind", supervisors=left)
        async with self._lock:
            if self._nursery is not None:
                await self._nursery.aclose()

    async def _living_nursery(self) -> _Nursery:
        if self._nursery is not None and not self._nursery.gone.is_set():
            return self._nursery
        for _ in range(_ATTEMPTS):
            self._nursery = _Nursery()
            await self._nursery.ready()
            if not self._nursery.gone.is_set():
                return self._nursery
        raise errors.RunnerError("the parent of all runs cannot be started: it ends at once, again and again")

    async def _ask_for(self, command: base.Command, grace_secs: float) -> _Channel:
        """Have a supervisor forked and give it the command; return when the program runs, or never will."""
        ours, theirs = socket.socketpair()
        channel = _Channel(ours, on_end=self._running.discard)
        try:
            with theirs, _output_of(command) as output:
                async with self._lock:
                    nursery = await self._living_nursery()
                    await nursery.send(theirs.fileno(), output)
            self._running.add(channel)
            await channel.send_command(command)
        except BaseException:
            channel.close()  # it has not got the whole command, so it starts nothing
            raise
        try:
            await channel.begun.wait()
        except asyncio.CancelledError:
            await channel.outlast(grace_secs, limit_secs=grace_secs + START_SECS)
            raise
        return channel


class _Channel:
    """The daemon's end of a run's channel; `supervisor` tells what is said over it.

    No transport: that would throw an exit that has arrived away when a late `stop` cannot be written any more.
    """

    def __init__(self, sock: socket.socket, on_end: Callable[[_Channel], None]) -> None:
        self.begun = asyncio.Event()  #: the program runs, or never will
        self.ended = asyncio.Event()  #: nothing is left
        self.supervisor_pid: int | None = None
        self.pid: int | None = None
        self.exit: base.ProcessExit | None = None  #: None after `ended`: the supervisor was killed
        self._on_end = on_end
        self._received = b""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        sock.settimeout(0)
        self._loop.add_reader(sock, self._read)

    async def send_command(self, command: base.Command) -> None:
        """Send all that the supervisor needs to start it."""
        spec = {
            "argv": command.argv,
            "env": dict(command.env),
            "cwd": str(command.cwd),
            "grace_secs": command.grace_secs,
            "cleanup": command.cleanup,
            "cleanup_secs": command.cleanup_secs,
            "user": None
            if command.user is None
            else [command.user.uid, command.user.gid, list(command.user.groups)],
            "oom_counter": str(_oom_counter()),
            "group": None if command.group is None else [command.group.path, command.group.version],
        }
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody there: `ended` comes
            await self._loop.sock_sendall(self._sock, json.dumps(spec).encode() + b"\n")

    def stop(self, grace_secs: float) -> None:
        """Ask for the end; nothing when it has ended."""
        if self.ended.is_set():
            return
        # Full only when the supervisor has been frozen through hundreds of such requests: it will read those.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            self._sock.send(json.dumps({"stop": grace_secs}).encode() + b"\n")

    async def outlast(self, grace_secs: float, limit_secs: float | None = None) -> None:
        """Stop, and wait for the end whoever cancels that; a cancellation kills at once and is raised at the end."""
        self.stop(grace_secs)
        limit = None if limit_secs is None else self._loop.call_later(limit_secs, self.close)
        cancelled = None
        while not self.ended.is_set():
            try:
                await self.ended.wait()
            except asyncio.CancelledError as exc:
                cancelled = exc
                self.stop(0)
        if limit is not None:
            limit.cancel()
        if cancelled is not None:
            raise cancelled

    def close(self) -> None:
        """Hang up: a supervisor that still is there ends everything, and then itself. Idempotent."""
        if self.ended.is_set():
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self.begun.set()
        self.ended.set()
        self._on_end(self)

    def _read(self) -> None:
        try:
            received = self._sock.recv(1 << 16)
        except ConnectionResetError:
            received = b""
        if not received:
            self.close()
            return
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        match message:
            case {"supervisor": pid}:
                self.supervisor_pid = pid
            case {"started": pid}:
                self.pid = pid
                self.begun.set()
            case {"exit": fields}:
                self.exit = base.ProcessExit(**fields)
                self.close()
            case _:
                log.error("unknown message of a supervisor", pid=self.supervisor_pid, keys=sorted(message))


class _Nursery:
    """The daemon's end of the nursery."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(0)
        fd = theirs.fileno()
        with theirs:
            self._program = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", _NURSERY, _PACKAGE_ROOT, str(fd)],
                env={name: os.environ[name] for name in _NURSERY_ENV if name in os.environ},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[fd],
                start_new_session=True,
            )

    async def ready(self) -> None:
        """Wait until it can be asked, or is `gone`."""
        try:
            hello = await self._loop.sock_recv(self._control, 1)
        except BaseException:
            self._program.kill()
            self._bury()
            raise
        if hello:
            self._loop.add_reader(self._control, self._ended)
        else:
            self._ended()

    async def send(self, channel: int, output: int) -> None:
        """Ask for a supervisor. A nursery that ends meanwhile drops the channel, which tells as much."""
        while not self.gone.is_set():
            try:
                socket.send_fds(self._control, [b"r"], [channel, output])
                return
            except BlockingIOError:
                await asyncio.sleep(_FULL_PAUSE_SECS)
            except (BrokenPipeError, ConnectionResetError):
                self._ended()

    async def aclose(self) -> None:
        """Let it end, and see that it does. Idempotent."""
        if self.gone.is_set():
            return
        self._loop.remove_reader(self._control)
        self._loop.add_reader(self._control, self._bury)
        self._control.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(_CLOSE_SECS):
                await self.gone.wait()
        except TimeoutError:
            log.warning("nursery killed", pid=self._program.pid)
            self._program.kill()
            await self.gone.wait()

    def _ended(self) -> None:
        self._bury()
        log.warning("nursery lost", pid=self._program.pid, code=self._program.returncode)

    def _bury(self) -> None:
        if self.gone.is_set():
            return
        self._loop.remove_reader(self._control)
        self._control.close()
        self._program.wait()  # it has let go of its socket, so it is ending: no wait worth the name
        self.gone.set()


@functools.cache
def _oom_counter() -> Path:
    return cgroups.oom_counter()


@contextlib.contextmanager
def _output_of(command: base.Command) -> Iterator[int]:
    # A named pipe that nobody reads would hold up the loop for ever; what is there for good may then block its writer.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK
    fd = open_unlinked(command.output, flags)
    try:
        os.set_blocking(fd, True)
        yield fd
    finally:
        os.close(fd)
