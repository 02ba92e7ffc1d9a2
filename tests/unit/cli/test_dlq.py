"""`dlq requeue` of many: what one daemon's answer means for the others."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import threading
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.cli import dlq
from runner.client.api import Away
from runner.daemon import lock
from runner.daemon.deadletters import DeadLetters
from runner.queues.base import QueueRef

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def letter(state: Path, queue: str, text: str = "t") -> str:
    """Its id."""
    path = DeadLetters(state / "dead-letter").add(
        QueueRef(account="a", name=queue), b"{}", digest="d", reason="malformed", text=text, attempts=0
    )
    return path.stem


@contextlib.contextmanager
def answering(answers: dict[str, int]) -> Iterator[str]:
    """A daemon's HTTP port, by the ids of dead letters."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            name = self.path.rpartition("/")[2]
            status = answers[name]
            told = (
                {"requeued": name, "queue": "rmq_a"} if status == 200 else {"error": f"because of {status}"}
            )
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


def test_whatever_a_message_says_is_shown_as_it_is_in_a_line_of_its_own(tmp_path, capsys):
    texts = ["no pkg[extra]", "uv: no such file [/tmp/x]", "[bold]two\nlines", "\x1b]0;title\x07"]
    for text in texts:
        letter(tmp_path, "rmq_\x1b[31mred", text)
    dlq.list_(state_dir=tmp_path)
    _, *lines = capsys.readouterr().out.splitlines()
    shown = [line.rstrip().partition(" 0 ")[2].strip() for line in lines]
    assert shown == [*texts[:2], "[bold]two lines", "\ufffd]0;title\ufffd"]
    assert all("rmq_\ufffd[31mred" in line for line in lines)


def test_the_working_directory_tells_where_the_state_directory_is_when_no_daemon_runs(
    tmp_path, capsys, monkeypatch
):
    work, state = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    name = letter(state, "rmq_a")
    with lock.sole_daemon(work), lock.state_held(work, state):
        pass
    dlq.list_(working_dir=work)
    assert name in capsys.readouterr().out
    dlq.drop([name], working_dir=work)
    assert not list(state.glob("dead-letter/*/*.json"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # it is another's
    with pytest.raises(errors.UsageError, match=f"{work}/state is no daemon's"):
        dlq.list_(working_dir=work)


def test_one_that_cannot_be_sent_again_does_not_keep_the_others(tmp_path, capsys):
    gone, dropped, good = (letter(tmp_path, queue) for queue in ("rmq_gone", "rmq_dropped", "rmq_good"))
    with answering({gone: 409, dropped: 404, good: 200}) as address:
        with pytest.raises(errors.RunnerError, match="2 of 3 could not be requeued"):
            dlq.requeue(every=True, state_dir=tmp_path, address=address, token=None)
        told = capsys.readouterr()
        assert told.out == f"requeued {good} to rmq_a\n"
        assert told.err.splitlines() == [f"{gone}: because of 409", f"{dropped}: because of 404"]
        dlq.requeue([good[-8:]], state_dir=tmp_path, address=address, token=None)


def test_a_broker_that_is_away_is_not_asked_for_each_of_them(tmp_path, capsys):
    first, second = (letter(tmp_path, queue) for queue in ("rmq_a", "rmq_b"))
    with answering({first: 503, second: 200}) as address, pytest.raises(Away, match="because of 503"):
        dlq.requeue(every=True, state_dir=tmp_path, address=address, token=None)
    assert not capsys.readouterr().out
