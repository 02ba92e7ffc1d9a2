"""`make demo`: one experiment from a queue to its results, on this machine and without any server.

Starts a daemon in .demo, submits examples/digits to the directory queue `local_demo`, shows what becomes of it, and leaves the
results in .demo/results. Ctrl-C stops all of it.
"""

from __future__ import annotations

import signal

# The other imports take a second, in which Ctrl-C is to end it without a traceback: there is nothing to stop yet.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.json import JSON
from rich.panel import Panel
from rich.text import Text

from runner import config, errors
from runner.cli import show
from runner.client.api import Away, Daemon
from runner.client.follow import End, follow
from runner.client.interrupts import uninterrupted
from runner.client.message import Storage
from runner.client.order import Order, Queue
from runner.client.submit import Submitted, submit
from runner.options import OPTIONS
from runner.storage import archive
from runner.storage.registry import Stores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner.client.views import Ending

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "digits"
QUEUE = "local_demo"
PROGRAM = Path(sys.executable).with_name("studio-runner")
START_SECS = 60.0
STOP_SECS = 30.0
EXIT_INTERRUPTED = 130
MAX_BYTES = 1 << 30

console = Console(highlight=False)


def main() -> int:
    """The exit code: the experiment's own, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=ROOT / ".demo", help="where everything lies")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    directory: Path = options.dir.absolute()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    began = time.monotonic()
    try:
        with daemon(directory) as process:
            submitted, ending = run_example(directory, process, options.epochs)
            document = read_document(submitted, ending)
            results = unpack(directory, submitted, ending, document)
        tell(directory, results, document, time.monotonic() - began)
    except KeyboardInterrupt:
        console.print(Text("interrupted: everything is stopped", style="yellow"))
        return EXIT_INTERRUPTED
    except errors.RunnerError as exc:
        console.print(Text(f"demo: {exc}", style="bold red"))
        return exc.exit_code
    return ending.code


@contextlib.contextmanager
def daemon(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon of this demo's own, ready. Afterwards neither it nor anything that it started is left, nor work in its queue."""
    refuse_company(directory)
    forget_work(directory)
    say(f"starting the daemon in {shown(directory)}")
    with contextlib.ExitStack() as stack:
        process = start(directory, stack)
        limit = time.monotonic() + START_SECS
        while not is_ready(directory, process):
            if process.poll() is not None or time.monotonic() > limit:
                log = (directory / "daemon.log").read_text(errors="replace")
                raise errors.RunnerError(f"the daemon did not start; its log ends with:\n{log[-2000:]}")
            time.sleep(0.05)  # between questions
        yield process


def refuse_company(directory: Path) -> None:
    """Raises UsageError when somebody works in the directory already: two cannot."""
    with contextlib.suppress(Away):
        Daemon(working_dir=directory).get("/healthz")
        pid = json.loads((directory / "studio-runner.json").read_bytes())["pid"]
        raise errors.UsageError(
            f"a daemon (process {pid}) works in {shown(directory)} already; it is left alone. "
            f"Stop it (kill {pid}), or use another directory: .venv/bin/python tools/demo.py --dir DIRECTORY"
        )


def start(directory: Path, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C is for this program, which then stops it in an orderly way."""
    configured = {option.env for option in OPTIONS}
    environment = {name: value for name, value in os.environ.items() if name not in configured}
    argv = [str(PROGRAM), "serve", f"--working-dir={directory}", "--prom-address=127.0.0.1:0"]
    with (directory / "daemon.log").open("wb") as log, uninterrupted():
        process = subprocess.Popen(
            [*argv, "--cpu-only", "--grace=3s", "--log-format=json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        stack.callback(stop, directory, process)
    return process


def stop(directory: Path, process: subprocess.Popen[bytes]) -> None:
    """End the daemon: what runs gets some seconds. Ctrl-C cannot cut this short, and need not: it is bounded."""
    with uninterrupted(forget=True):
        process.terminate()
        try:
            process.wait(STOP_SECS)
        except subprocess.TimeoutExpired:
            process.kill()  # its supervisors end what it ran
            process.wait()
        forget_work(directory)


def is_ready(directory: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether our daemon takes work."""
    try:
        told = json.loads((directory / "studio-runner.json").read_bytes())
        Daemon(working_dir=directory).get("/readyz")
    except (OSError, ValueError, Away):
        return False
    return bool(told["pid"] == process.pid)


def forget_work(directory: Path) -> None:
    """An empty queue: what an interrupted demo left in it is not for the next one. Results that were half unpacked go too."""
    shutil.rmtree(directory / "queue", ignore_errors=True)
    for path in ("queue/" + QUEUE, "results"):
        (directory / path).mkdir(parents=True, exist_ok=True)
    for half in (directory / "results").glob(".new-*"):
        shutil.rmtree(half, ignore_errors=True)


def run_example(directory: Path, process: subprocess.Popen[bytes], epochs: int) -> tuple[Submitted, Ending]:
    """Submit and follow."""
    shower = show.chosen(as_json=False)
    order = Order(
        directory=EXAMPLE,
        command=["train.py", "--epochs", str(epochs)],
        queue=Queue(name=QUEUE, root=directory / "queue"),
        storage=Storage(type="local", endpoint=str(directory), bucket="storage"),
        requirements=(EXAMPLE / "requirements.txt").read_text().split(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        project="demo",
    )
    stores = Stores(config.S3())
    with contextlib.closing(stores), shower:
        submitted = submit(order, stores, shower)
        shower.submitted(submitted)
        return submitted, asyncio.run(watch(submitted, stores, shower, directory, process))


async def watch(
    submitted: Submitted, stores: Stores, shower: show.Show, directory: Path, process: subprocess.Popen[bytes]
) -> Ending:
    """Show what becomes of it; how it ended. Without its daemon it never would."""

    async def events() -> Ending:
        async for event in follow(submitted, stores, Daemon(working_dir=directory)):
            shower.event(event)
            if isinstance(event, End):
                return event.ending
        raise AssertionError  # the last event is an End

    following = asyncio.create_task(events())
    while process.poll() is None:
        if (await asyncio.wait({following}, timeout=1.0))[0]:
            return await following
    following.cancel()
    raise errors.RunnerError(f"the daemon has ended; its log is {shown(directory / 'daemon.log')}")


def read_document(submitted: Submitted, ending: Ending) -> dict[str, Any]:
    """The scraped document, from the storage; empty when there is none."""
    location = submitted.locations["_metadata"]
    path = Path(location.bucket) / "metadata" / f"scrape-host-{ending.accession}.json"
    with contextlib.suppress(FileNotFoundError):
        document: dict[str, Any] = json.loads(path.read_bytes())
        return document
    return {}


def unpack(directory: Path, submitted: Submitted, ending: Ending, document: dict[str, Any]) -> Path:
    """The results as files for people: complete, or not there at all."""
    results = directory / "results" / (ending.accession or submitted.key)
    partial = Path(tempfile.mkdtemp(prefix=".new-", dir=directory / "results"))
    try:
        partial.chmod(0o755)
        for tag in ("modeldir", "output"):
            location = submitted.locations[tag]
            packed = Path(location.bucket) / location.key
            if packed.exists():
                (partial / tag).mkdir()
                with packed.open("rb") as stream:
                    archive.unpack(
                        stream,
                        partial / tag,
                        limits=archive.UnpackLimits(total_bytes=MAX_BYTES),
                        name_if_file=tag,
                    )
        (partial / "metadata.json").write_text(json.dumps(document, indent=2) + "\n")
        partial.rename(results)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return results


def tell(directory: Path, results: Path, document: dict[str, Any], secs: float) -> None:
    """Where everything is, and how long it took beside the first time."""
    if document:
        text = JSON.from_data(folded(document))
        console.print(Panel(text, title="the scraped document", border_style="dim"))
    console.print(Text("results", style="bold"), f"in {shown(results)}")
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        console.print(f"  {shown(path)}", soft_wrap=True)
    console.print(Text(f"archives as uploaded: {shown(directory / 'storage')}", style="dim"), soft_wrap=True)
    console.print(
        Text(f"the daemon's log:     {shown(directory / 'daemon.log')}", style="dim"), soft_wrap=True
    )
    environment = document.get("runner", {}).get("environment", {})
    how = "environment cached" if environment.get("environment_cached") else "environment built"
    note = directory / "first.json"
    if note.exists():
        first = json.loads(note.read_bytes())["secs"]
        console.print(f"took [bold]{secs:.1f} s[/] ({how}); the first time it was {first:.1f} s")
    else:
        note.write_text(json.dumps({"secs": secs}))
        console.print(f"took [bold]{secs:.1f} s[/] ({how}); again it will be faster")


def folded(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what would fill the screen: the message in it, and long addresses."""
    artifacts = {tag: f"...{uri[-40:]}" for tag, uri in document["studioml"]["artifacts"].items()}
    return document | {
        "runner": document["runner"] | {"request": "... (the message, without secrets)"},
        "studioml": document["studioml"] | {"artifacts": artifacts},
    }


def say(text: str) -> None:
    """A line of our own."""
    console.print(Text(text, style="dim"))


def shown(path: Path) -> str:
    """A path as short as it can be."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
