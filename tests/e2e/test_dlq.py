"""`studio-runner dlq` and `explain` against a real daemon."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.e2e import messages
from tests.servers.daemon import PROGRAM, clean_environment

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon, MakeDaemon

QUEUE = "local_a"


def put(daemon: Daemon, body: bytes, queue: str = QUEUE) -> None:
    (daemon.queue_root / queue).mkdir(exist_ok=True)
    hidden = daemon.queue_root / queue / ".m"
    hidden.write_bytes(body)
    hidden.rename(hidden.with_name("m"))


def removed(directory: pathlib.Path) -> bool:
    """Whether it was empty: who looks for messages has a lock file there for a moment."""
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


def run(daemon: Daemon, *arguments: str, code: int = 0) -> str:
    ended = subprocess.run(
        [str(PROGRAM), *arguments, f"--working-dir={daemon.working_dir}"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


def test_a_dead_letter_is_listed_shown_and_dropped(daemons: MakeDaemon):
    daemon = daemons()
    put(daemon, b"not json", "local_b")
    daemon.until(daemon.dead_letters)
    (nonsense,) = json.loads(run(daemon, "dlq", "list", "--queue=local_b", "--json"))
    assert nonsense["reason"] == "malformed"
    assert nonsense["id"] in run(daemon, "dlq", "list")
    shown = json.loads(run(daemon, "dlq", "show", nonsense["id"][-8:]))
    assert shown["queue"] == "local_b"
    assert "dropped" in run(daemon, "dlq", "drop", nonsense["id"])
    assert run(daemon, "dlq", "list", "--queue=local_b") == "no dead letters\n"
    assert "no dead letter is called" in run(daemon, "dlq", "show", "nothing", code=2)


def test_a_requeued_dead_letter_is_a_new_message(daemons: MakeDaemon):
    daemon = daemons()
    body = messages.on_directory(
        daemon.storage, "print('ran')", "k", config={"env": {"SECRET_KEY": "canary-secret"}}
    )
    archive = daemon.storage / "k.tar"
    whole = archive.read_bytes()
    archive.write_bytes(messages.archive({"../escape": "x"}))
    put(daemon, body)
    (letter,) = daemon.until(daemon.dead_letters)
    assert letter["reason"] == "archive"
    assert "canary" not in run(daemon, "dlq", "show", letter["time"][:4])
    archive.write_bytes(whole)
    assert "requeued" in run(daemon, "dlq", "requeue", "--all")
    daemon.until(lambda: (daemon.storage / "experiments/k/output.tar").exists() and not daemon.dead_letters())
    daemon.until(lambda: any(each["status"] == "completed" for each in daemon.runs()))
    assert "--all" in run(daemon, "dlq", "requeue", code=2)


def test_what_cannot_be_requeued_stays(daemons: MakeDaemon):
    daemon = daemons()
    put(daemon, b"nonsense")
    (letter,) = daemon.until(daemon.dead_letters)
    daemon.until(lambda: removed(daemon.queue_root / QUEUE))
    assert "does not exist any more" in run(daemon, "dlq", "requeue", "--all", code=1)
    assert daemon.dead_letters() == [letter]
    daemon.stop()
    assert "no daemon works" in run(daemon, "dlq", "requeue", "--all", code=1)


def test_explain_says_why_nothing_runs(daemons: MakeDaemon, tmp_path):
    daemon = daemons("--max-cores=1")
    (daemon.queue_root / "local_idle").mkdir()
    put(daemon, messages.on_directory(daemon.storage, messages.WAIT.format(go=str(tmp_path / "go")), "k"))
    daemon.until(lambda: any(each["stage"] == "running" for each in daemon.runs()))
    daemon.until(lambda: "local_idle" in run(daemon, "explain"))
    assert "no core is free" in run(daemon, "explain", QUEUE)
    assert "1 running" in run(daemon, "explain", QUEUE)
    assert "does not match" in run(daemon, "explain", "other")
    assert "no account has a queue of that name" in run(daemon, "explain", "local_nowhere")
    assert json.loads(run(daemon, "explain", QUEUE, "--json"))["queues"][0]["running"] == 1
    (tmp_path / "go").touch()
    daemon.until(lambda: "open" in run(daemon, "explain", QUEUE))
    put(daemon, messages.on_directory(daemon.storage, "print()", "big", resources_needed={"cpus": 500}))
    daemon.until(lambda: "more than this machine has" in run(daemon, "explain", QUEUE))
