"""What the nursery and the supervisors need of Linux. Standard library only: both stay small and start fast.

libc is loaded when this module is imported, so that nothing has to be loaded between fork and exec.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_OOM_SCORE = b"500"  #: of -1000 (never) to 1000 (first)
_WORKLOAD_FDS = 65_536

_CLONE_INTO_CGROUP = 0x2_0000_0000
_SYS_CLONE3 = 435  #: the same number on every architecture

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_MAX_FDS = os.sysconf("SC_OPEN_MAX")


class _CloneArgs(ctypes.Structure):
    """What clone3(2) is asked for, as of Linux 5.7."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    )


#: Of `PyDLL`, whose calls keep the interpreter's lock: a child must not have to wait for a thread that it has not got.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.POINTER(_CloneArgs), ctypes.c_size_t]
_syscall.restype = ctypes.c_long


def become_subreaper() -> None:
    """From now on orphans among our descendants become our children, not those of process 1."""
    _call(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends.

    Call it in the child, then check `os.getppid`: a parent that ended before the call is not noticed.
    """
    _call(_PR_SET_PDEATHSIG, signal.SIGKILL)


def bound_workload() -> None:
    """What bounds every workload, and harms none.

    No core dumps. As many descriptors as the daemon may give, up to 65536: data loaders run out of the usual 1024. Not
    RLIMIT_AS (CUDA reserves far more than it uses), not RLIMIT_NPROC (counts per user), not RLIMIT_FSIZE (counts holes).
    When memory runs out the kernel takes a workload before the daemon or a supervisor: anybody may raise that score.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = _WORKLOAD_FDS if hard == resource.RLIM_INFINITY else min(hard, _WORKLOAD_FDS)
    if soft != resource.RLIM_INFINITY and soft < many:
        resource.setrlimit(resource.RLIMIT_NOFILE, (many, hard))
    with contextlib.suppress(OSError):  # no /proc, or the daemon's own is higher already
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, _OOM_SCORE)
        finally:
            os.close(fd)


def become(uid: int, gid: int, groups: list[int]) -> None:
    """Be another user for good, also through programs that are set-uid. Undoes `die_with_parent`. Raises OSError."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _call(_PR_SET_NO_NEW_PRIVS, 1)


def fork_into(cgroup_fd: int) -> int:
    """`os.fork`, whose child begins in the control group (version 2) with that directory.

    To move a process later takes the kernel 10 to 30 ms (docs/performance.md), while nobody on the machine can fork.
    To be called without other threads. Raises OSError where the kernel (before 5.7) or a sandbox does not know clone3.
    """
    request = _CloneArgs(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=cgroup_fd)
    ctypes.pythonapi.PyOS_BeforeFork()  # as the C API wants it around every fork
    pid: int = _syscall(_SYS_CLONE3, ctypes.byref(request), ctypes.sizeof(request))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return pid
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return pid


def set_name(name: str) -> None:
    """What `ps -o comm` shows of this process; at most 15 bytes."""
    _call(_PR_SET_NAME, ctypes.cast(ctypes.create_string_buffer(name.encode()), ctypes.c_void_p).value or 0)


def _call(option: int, argument: int) -> None:
    if _prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


#: Python ignores some of its own accord; one that the daemon was started with (nohup) counts as well.
_ignored = {number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN}


def ignore_requests_to_end() -> None:
    """For the nursery and the supervisors: they end with their daemon, not by a signal.

    A service manager or a terminal that signals everybody must not take the supervisor away from a run that the daemon
    is draining.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
        _ignored.add(number)


def default_signals() -> None:
    """Give a workload the signals that a program expects to start with: nothing ignored, nothing blocked.

    Handlers end with exec by themselves, so only what is ignored is touched: each page written here is copied first.
    """
    for number in _ignored:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def close_others(keep: int) -> None:
    """Close every descriptor above 2 but `keep`."""
    os.closerange(3, keep)
    os.closerange(keep + 1, _MAX_FDS)


class Wakeup:
    """Becomes readable when a child ends. One per process, in the main thread.

    Better than a pidfd each: it also tells of children that were adopted, and every kernel has it.
    """

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # Without a handler Python would not write to the pipe. It may do nothing: the byte is the message.
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def clear(self) -> None:
        """Forget what was told so far. Reap after it, not before: a child that ends in between tells anew."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass

    def close(self) -> None:
        """Give the descriptors back: a forked process must not wake its parent."""
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._writer)


class Poller:
    """`select.poll` in seconds, over descriptors that are read from."""

    def __init__(self, *fds: int) -> None:
        self._poll = select.poll()
        for fd in fds:
            self.add(fd)

    def add(self, fd: int) -> None:
        """Watch one more."""
        self._poll.register(fd, select.POLLIN)

    def remove(self, fd: int) -> None:
        """Watch it no longer."""
        self._poll.unregister(fd)

    def wait(self, timeout_secs: float | None) -> set[int]:
        """Return the descriptors that can be read or are at their end; none after the timeout. None: no timeout."""
        # Rounded up: a round too early would find nothing due, and would spin until it is.
        timeout_ms = None if timeout_secs is None else int(max(0.0, timeout_secs) * 1000) + 1
        return {fd for fd, _ in self._poll.poll(timeout_ms)}
