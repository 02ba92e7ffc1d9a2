"""One run's parent: starts the workload, waits for it, and lets nothing of it live on. Standard library only.

A supervisor is forked from the nursery and talks with the daemon over its channel, one JSON object a line:

    daemon      {"argv": [...], "env": {...}, "cwd": "...", "grace_secs": 10.0,     first, once
                 "cleanup": [...], "cleanup_secs": 20.0, "user": [uid, gid, groups], "group": [path, version],
                 "oom_counter": "/path"}
                {"stop": 5.0}                                                       grace; the shortest one counts
    supervisor  {"supervisor": pid}   before it starts anything
                {"started": pid}      the workload is running its program
                {"exit": {...}}       `ProcessExit`; nothing of the run is left

The end of the channel means that the daemon is gone (DESIGN.md rule 6): TERM, a grace of at most 3 seconds, KILL.
It is a child subreaper, so every process of the run stays below it, however often it forks or leaves its session,
and "no child is left" means that nothing is left. No thread, no reading of output: that goes straight to its file.

When nothing is left of the workload, the cleanup runs, if there is one, and then the control group is removed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource  # noqa: F401 - os.wait4 needs it, and would load it anew in every supervisor: 1 ms
import time
from typing import Any, NoReturn

from runner.process import cgroup, kernel, tree

LINGER_SECS = 0.05  #: helpers that end with their parent (pools, resource trackers) may do so by themselves
STRAY_GRACE_SECS = 0.5  #: between TERM and KILL for what the workload has left behind
VANISHED_GRACE_SECS = 3.0  #: at most this between TERM and KILL when the daemon is gone
_FIRST_PAUSE_SECS, _LAST_PAUSE_SECS = 0.005, 0.5  #: between two rounds of KILL
_KILLED = 128 + 9  #: the exit code of a shell whose program was killed


def say(channel: int, message: dict[str, Any]) -> None:
    """Send the daemon one message; nothing when it is gone."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(channel, json.dumps(message).encode() + b"\n")


def refused(exc: OSError | ValueError, what: str) -> str:
    """Why a program could not be started, in the words of `ProcessExit.error`."""
    return f"{exc.strerror}: {what!r}" if isinstance(exc, OSError) else f"{exc}: {what!r}"


class Supervisor:
    """The supervision of one run. May be made long before there is one."""

    def __init__(self) -> None:
        kernel.become_subreaper()
        self._channel = -1
        self._wakeup = kernel.Wakeup()
        self._poller = kernel.Poller(self._wakeup.fd)
        self._received = b""  # of a line that is not complete yet
        self._grace_secs = VANISHED_GRACE_SECS
        self._group: cgroup.Group | None = None
        self._oom_counter = ""
        self._oom_kills = 0  # among the daemon's processes, before it began
        self._pid = 0
        self._refusal = -1  # reads why the workload's program could not be executed; ends when it could
        self._error = b""
        self._began = 0.0
        self._elapsed_secs: float | None = None  # known when the workload has ended
        self._unasked = False  # it ended before anybody had asked for that
        self._status = 0
        self._user_secs = self._system_secs = 0.0
        self._max_rss_bytes = 0
        self._stopped = False
        self._term_at = self._kill_at = math.inf  # by time.monotonic
        self._pause_secs = _FIRST_PAUSE_SECS
        self._killed: set[tuple[int, int]] = set()  # together with the workload
        self._strays: set[tuple[int, int]] = set()

    def run(self, channel: int, output: int) -> None:
        """Run what the daemon asks for over `channel` to its very end.

        Nothing is started when the daemon is gone before it has asked.
        """
        self._channel = channel
        self._poller.add(channel)
        say(channel, {"supervisor": os.getpid()})
        while not (lines := self._read_lines()):
            if lines is None:
                return
        spec = json.loads(lines[0])
        self._grace_secs = min(spec["grace_secs"], VANISHED_GRACE_SECS)
        self._group = cgroup.Group(*spec["group"]) if spec["group"] else None
        self._oom_counter = spec["oom_counter"]
        self._oom_kills = _oom_kills(self._oom_counter)
        try:
            self._launch(spec, output)
        except OSError as exc:  # no process or descriptor to be had
            end: dict[str, Any] = {"code": None, "error": refused(exc, spec["argv"][0])}
        else:
            for line in lines[1:]:
                self._obey(line)
            while self._reap():
                self._end_what_is_due()
                self._attend()
            end = self._exit()
        if spec["cleanup"]:
            self._clean_up(spec)
        if self._group is not None:
            self._group.remove()
        say(channel, {"exit": end})

    def _clean_up(self, spec: dict[str, Any]) -> None:
        """Run the cleanup to its end, or to that of its time; nothing of it is left either. How it ends is nobody's concern.

        Nothing can hasten it: who stops the run, or is gone, wants exactly this to be done.
        """
        until = time.monotonic() + spec["cleanup_secs"]
        poller = kernel.Poller(self._wakeup.fd)
        pid = None
        while True:
            self._wakeup.clear()
            now = time.monotonic()
            if pid is None and now < until:
                with contextlib.suppress(OSError):  # no process to be had just now
                    pid = os.fork()
                    if pid == 0:
                        _become_cleanup(spec["cleanup"], spec["env"])
            try:
                while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                    if ended == pid:
                        until = min(until, now + STRAY_GRACE_SECS)
            except ChildProcessError:
                if pid is not None or now >= until:
                    return
            if now >= until:
                tree.kill(tree.descendants(os.getpid()))
            poller.wait(_LAST_PAUSE_SECS if now >= until or pid is None else until - now)

    def _launch(self, spec: dict[str, Any], output: int) -> None:
        self._refusal, refusal = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self._began = time.monotonic()
        # Its group gone under us: then what it uses is measured, as where no group can be made.
        self._pid = os.fork() if self._group is None else self._group.fork()
        if self._pid == 0:
            _become_workload(spec, parent, output, refusal)
        os.close(refusal)
        os.close(output)
        self._poller.add(self._refusal)

    def _attend(self) -> None:
        """Wait for news or for the next step that is due, and take the news in."""
        ready = self._poller.wait(self._patience_secs())
        if self._wakeup.fd in ready:
            self._wakeup.clear()
        if self._refusal in ready:
            self._read_refusal()
        if self._channel in ready:
            lines = self._read_lines()
            if lines is None:
                self._poller.remove(self._channel)
                self._stop(self._grace_secs)
            for line in lines or ():
                self._obey(line)

    def _read_refusal(self) -> None:
        text = os.read(self._refusal, 4096)
        self._error += text
        if text:
            return
        self._poller.remove(self._refusal)
        os.close(self._refusal)
        self._refusal = -1
        if not self._error:
            say(self._channel, {"started": self._pid})

    def _read_lines(self) -> list[bytes] | None:
        """Wait for something from the daemon; return the lines that are complete now, None when it is gone."""
        try:
            received = os.read(self._channel, 1 << 20)
        except ConnectionResetError:
            return None
        if not received:
            return None
        *lines, self._received = (self._received + received).split(b"\n")
        return lines

    def _obey(self, line: bytes) -> None:
        self._stopped = self._stopped or self._elapsed_secs is None
        self._stop(json.loads(line)["stop"])

    def _stop(self, grace_secs: float) -> None:
        """TERM now, unless that was sent, and KILL after the grace, unless that is due earlier."""
        now = time.monotonic()
        if self._kill_at == math.inf:
            self._term_at = now
        self._kill_at = min(self._kill_at, now + grace_secs)

    def _reap(self) -> bool:
        """Take note of every child that has ended; return whether any is left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self._user_secs += usage.ru_utime
            self._system_secs += usage.ru_stime
            self._max_rss_bytes = max(self._max_rss_bytes, usage.ru_maxrss * 1024)
            if pid == self._pid:
                self._workload_ended(status)

    def _workload_ended(self, status: int) -> None:
        now = time.monotonic()
        self._status = status
        self._elapsed_secs = now - self._began
        self._unasked = self._kill_at == math.inf
        while self._refusal != -1:  # the writer is gone, so this does not block
            self._read_refusal()
        if self._kill_at == math.inf:
            self._term_at = now + LINGER_SECS
        self._kill_at = min(self._kill_at, now + LINGER_SECS + STRAY_GRACE_SECS)

    def _patience_secs(self) -> float | None:
        if (now := time.monotonic()) >= self._kill_at:
            return self._pause_secs
        due = min(self._term_at, self._kill_at)
        return None if due == math.inf else due - now

    def _end_what_is_due(self) -> None:
        """TERM once; KILL in rounds: one whenever a child ends (what it had started is ours now), or after a pause."""
        now = time.monotonic()
        if now < min(self._term_at, self._kill_at):
            return
        found = tree.descendants(os.getpid())
        alive = {(entry.pid, entry.start) for entry in found if not entry.zombie}
        if self._elapsed_secs is not None:
            self._strays |= alive - self._killed
        if now < self._kill_at:
            tree.terminate(found)
            self._term_at = math.inf
            return
        tree.kill(found)
        if self._group is not None:
            self._group.kill()
        if self._elapsed_secs is None:
            self._killed |= alive
        self._pause_secs = min(2 * self._pause_secs, _LAST_PAUSE_SECS)

    def _exit(self) -> dict[str, Any]:
        code = os.waitstatus_to_exitcode(self._status)
        error = self._error.decode(errors="replace")
        return {
            "code": code if code >= 0 and not error else None,
            "signal": -code if code < 0 else None,
            "error": error or None,
            "stopped": self._stopped,
            "strays": len(self._strays),
            "elapsed_secs": self._elapsed_secs,
            "user_secs": self._user_secs,
            "system_secs": self._system_secs,
            "max_rss_bytes": self._max_rss_bytes,
            "oom": self._oom(code),
        }

    def _oom(self, code: int) -> str:
        """Whether the kernel has ended it for want of memory, with the figures; empty when nothing says so."""
        if code == 0 or self._error:
            return ""
        if self._group is not None and (kills := self._group.oom_kills()):
            return (
                f"the kernel ended {kills} of its processes: it may use {_mib(self._group.limit_bytes())}, "
                f"and had used {_mib(self._group.peak_bytes())}"
            )
        # Somebody's KILL, and the kernel has ended some process beside us for want of memory meanwhile.
        if code in {-9, _KILLED} and self._unasked and -1 < self._oom_kills < _oom_kills(self._oom_counter):
            return (
                "it was killed while the machine ran out of memory; "
                f"its largest process had {_mib(self._max_rss_bytes)}"
            )
        return ""


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB of memory"


def _oom_kills(counter: str) -> int:
    """How many processes the kernel has ended for want of memory; -1 when it does not tell (before 4.13)."""
    try:
        fd = os.open(counter, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        text = os.read(fd, 1 << 14)
    finally:
        os.close(fd)
    _, found, rest = (b"\n" + text).partition(b"\noom_kill ")
    return int(rest.split(b"\n", 1)[0]) if found else -1


def _become_workload(spec: dict[str, Any], parent: int, output: int, refusal: int) -> NoReturn:
    """Between fork and exec. Says on `refusal` why it could not; never returns."""
    what = spec["cwd"]
    try:
        kernel.default_signals()
        os.setsid()
        kernel.die_with_parent()
        if os.getppid() != parent:
            os._exit(127)
        _confine(spec)
        if os.getppid() != parent:
            os._exit(127)
        os.dup2(output, 1)
        os.dup2(output, 2)
        kernel.close_others(refusal)
        os.chdir(what)
        what = spec["argv"][0]
        os.execvpe(what, spec["argv"], spec["env"])  # noqa: S606 - looked up on the PATH of `env`
    except (OSError, ValueError) as exc:
        os.write(refusal, refused(exc, what).encode(errors="replace"))
    finally:
        os._exit(127)


def _confine(spec: dict[str, Any]) -> None:
    kernel.bound_workload()
    if spec["user"]:
        kernel.become(*spec["user"])
        kernel.die_with_parent()


def _become_cleanup(argv: list[str], env: dict[str, str]) -> NoReturn:
    """Between fork and exec of the cleanup. Never returns."""
    try:
        kernel.default_signals()
        os.setsid()
        os.dup2(1, 2)  # ours is /dev/null
        kernel.close_others(2)
        os.chdir("/")
        os.execvpe(argv[0], argv, env)  # noqa: S606 - looked up on the PATH of `env`
    finally:
        os._exit(127)
