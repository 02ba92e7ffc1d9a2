"""`studio-runner serve`: the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING

from runner import errors
from runner.resources import cards
from runner.telemetry import logs

if TYPE_CHECKING:
    from pathlib import Path

    from runner import config

#: Larger ones are no list of certificates (INTEROP.md 9.1).
MAX_CA_BYTES = 128 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 1 << 20
#: Exit codes of a daemon that was made to end: 128 and the signal.
FORCED = 128


def serve(options: config.Config) -> int:
    """Run the daemon until it ends; returns the exit code (DESIGN.md 5.10). Raises UsageError for unusable files."""
    check_files(options)
    logs.configure(options.logs, sys.stderr)
    give_memory_back()
    try:
        return asyncio.run(run_daemon(options))
    finally:
        logs.flush()


def give_memory_back() -> None:
    """Let large pieces of memory return to the system as they are freed.

    glibc learns from the first freed part of an upload (16 MiB) to keep the next ones for itself, in each thread's heap: some
    gigabytes of results would leave the daemon twice as large for ever.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


async def run_daemon(options: config.Config) -> int:
    """The daemon in the running loop."""
    # Imported here: `--help` and refusals of options need none of it.
    import stamina

    from runner.cli.parts import parts
    from runner.daemon.service import Service

    # Each retry of a request in the log would hide what matters: the runner says itself when a server stays away.
    stamina.instrumentation.set_on_retry_hooks(())
    if options.queues.root == options.paths.working_dir / "queue":
        # The embedded default. A root that the operator names must be there: it may be a file system that is not mounted.
        try:
            # Workloads of another user come through the directory above it, and messages hold secrets.
            mode = 0o700 if options.runs.run_as else 0o777
            options.queues.root.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as exc:
            raise errors.UsageError(
                f"--working-dir={options.paths.working_dir}: no directory of queues can be made in it: {exc.strerror}"
            ) from exc
    code = await Service(options, parts(options)).run()
    if code >= FORCED:
        # "At once": a thread in a transfer that has stalled would be waited for, until its time limit.
        logs.flush()
        os._exit(code)
    return code


def check_files(options: config.Config) -> None:
    """Raises UsageError, naming option and file, when a file that the configuration names cannot be used."""
    cards.load(options.machine.gpu_cards)
    named = {"s3-ca": options.s3.ca, "s3-cert": options.s3.cert, "s3-key": options.s3.key}
    for name, path in named.items():
        if path is not None:
            _check_pem(name, path)


def _check_pem(name: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CA_BYTES + 1)
    except OSError as exc:
        raise errors.UsageError(f"--{name}={path}: {exc.strerror}: the file must be readable") from exc
    if len(text) > MAX_CA_BYTES:
        raise errors.UsageError(f"--{name}={path}: larger than 128 KiB: not a PEM file of certificates")
    if b"-----BEGIN " not in text:
        raise errors.UsageError(f"--{name}={path}: no PEM data in it (it starts with -----BEGIN)")
