"""One daemon a working directory, and how clients on this machine find it (DESIGN.md 5.9, 5.10)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "studio-runner.lock"
ADDRESS = "studio-runner.json"
STATE = "studio-runner.state"


@contextlib.contextmanager
def sole_daemon(working_dir: Path) -> Iterator[None]:
    """Hold the working directory, and forget the address when that ends. Raises as `held`."""
    with held(working_dir, "--working-dir"):
        try:
            yield
        finally:
            (working_dir / ADDRESS).unlink(missing_ok=True)


@contextlib.contextmanager
def held(directory: Path, option: str) -> Iterator[None]:
    """Hold a directory that one daemon at a time may use. The kernel lets go of it when the process ends, however it ends.

    Raises:
        errors.UsageError: another daemon holds it (its process id is named), or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise errors.UsageError(f"{option} {directory}: cannot be used: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 32).decode(errors="replace").strip()
            raise errors.UsageError(
                f"{option} {directory}: another daemon (process {holder or 'unknown'}) works there; "
                "stop it, or give this one a directory of its own"
            ) from None
        os.truncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def state_held(working_dir: Path, state_dir: Path) -> Iterator[None]:
    """Hold the state directory as well, and write down where it is, for those who ask when no daemon runs. Raises as `held`."""
    with held(state_dir, "--state-dir"):
        _write(working_dir / STATE, os.fsencode(state_dir.absolute()))
        yield


def state_of(working_dir: Path) -> Path | None:
    """The state directory of the last daemon that worked there; None when none has told this user.

    What another user has put there is not believed: the working directory may be `/tmp`.
    """
    try:
        file = os.open(working_dir / STATE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file, "rb") as told:  # noqa: PTH123 - as it was opened
            return Path(os.fsdecode(told.read())) if os.fstat(file).st_uid == os.geteuid() else None
    except OSError:
        return None


def announce(working_dir: Path, address: tuple[str, int]) -> None:
    """Write down where this daemon answers, for clients on this machine."""
    host, port = address
    host = f"[{host}]" if ":" in host else host
    content = orjson.dumps(
        {"address": f"{host}:{port}", "pid": os.getpid()}, option=orjson.OPT_APPEND_NEWLINE
    )
    _write(working_dir / ADDRESS, content)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 - a mode at birth
        file.write(content)
    partial.replace(path)
