from __future__ import annotations

import asyncio
import io
import json
import logging
import os

import pytest
import structlog

from runner import config
from runner.telemetry import logs
from runner.telemetry import sink as sinks
from runner.telemetry.redact import secrets

log = structlog.get_logger("runner.test")


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger()
    level = root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    for handler in [handler for handler in root.handlers if isinstance(handler, logs._Forward)]:
        root.removeHandler(handler)
    root.setLevel(level)
    logging.getLogger("pika").setLevel(logging.NOTSET)


@pytest.fixture
def start():
    def configure(**options):
        stream = io.StringIO()
        logs.configure(config.Logs(**options), stream)
        return stream

    return configure


def records(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_time_level_event_and_what_is_bound(start):
    stream = start(format="json")
    with structlog.contextvars.bound_contextvars(queue="rmq_x", attempt=2):
        log.info("experiment started", project="p")
    (record,) = records(stream)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "level": "info",
        "event": "experiment started",
        "logger": "runner.test",
        "project": "p",
        "queue": "rmq_x",
        "attempt": 2,
    }


@pytest.mark.parametrize("value", ["\udcff", 2**70, object(), {1: {2: b"\xff"}}, float("nan"), {"a"}])
def test_any_value_can_be_logged(start, value):
    stream = start(format="json")
    log.info("odd", value=value)
    assert records(stream)[0]["event"] == "odd"
    stream = start(format="console")
    log.info("odd", value=value)
    assert "odd value=" in stream.getvalue()


def test_secrets_leave_no_line(start):
    for form in ("json", "console"):
        stream = start(format=form)
        with secrets.known(["canary-one"]):
            log.info("x", url="amqp://u:canary-two@h/", password="canary-three", note="it is canary-one")
            try:
                raise OSError("http://u:canary-four@h/ and canary-one")
            except OSError as exc:
                log.exception("failed", error=exc)
            logging.getLogger("urllib3").warning("retry %s", "https://u:canary-five@h")
        assert len(stream.getvalue().splitlines()) >= 3
        assert "canary" not in stream.getvalue()


def test_levels_hide_and_show(start):
    stream = start(format="json", level="warning")
    log.debug("no")
    log.info("no")
    log.warning("yes")
    assert [record["event"] for record in records(stream)] == ["yes"]
    stream = start(format="json", level="debug")
    log.debug("yes")
    assert [record["event"] for record in records(stream)] == ["yes"]


def test_a_runs_own_log_has_its_records_whatever_the_level(start, tmp_path):
    stream = start(format="json", level="error")
    path = tmp_path / "run.log"
    log.info("before", run="r1")
    with logs.capture("r1", path):
        log.info("staged", secret="canary", artifact="a")
        log.debug("not so fine")
        log.info("of another", run="r2")
    log.info("after", run="r1")
    assert stream.getvalue() == ""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["event"], record["run"]) for record in kept] == [("staged", "r1")]
    assert "canary" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_captures_of_concurrent_runs_do_not_mix(start, tmp_path):
    start(format="json")
    meet = asyncio.Barrier(3)

    async def run(name):
        with logs.capture(name, tmp_path / name):
            await meet.wait()
            await asyncio.to_thread(log.info, "from a thread", who=name)
            await asyncio.create_task(say(name))
            await meet.wait()

    async def say(name):
        log.info("from a task", who=name)

    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(run(name))
    for name in "abc":
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [(line["event"], line["who"]) for line in lines] == [
            ("from a thread", name),
            ("from a task", name),
        ]


def test_a_runs_own_log_is_bounded(start, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "RUN_LOG_BYTES", 2000)
    start(format="json")
    with logs.capture("r", tmp_path / "log"):
        for number in range(100):
            log.info("again", number=number)
    lines = (tmp_path / "log").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "log ends here: too long"
    assert 5 < len(lines) < 30


def test_a_console_line_cannot_be_forged(start):
    stream = start(format="console")
    log.info("evil\nfake \x1b[2J", name="a\rb", pair='x="y" z')
    (line,) = stream.getvalue().splitlines()
    assert r"evil\nfake \x1b[2J name=a\rb" in line
    assert r'pair="x=\"y\" z"' in line


def test_past_the_width_keys_have_lines_of_their_own(start):
    stream = start(format="console", width=60)
    log.info("short", a=1)
    log.info(
        "experiment started", queue="rmq_aaaaaaaaaaaaa", project="bbbbbbbbbbb", key="ccccccccccccccccccccccc"
    )
    short, first, *more = stream.getvalue().splitlines()
    assert short.endswith("info    short a=1")
    assert first.endswith("experiment started")
    assert more == ["    queue=rmq_aaaaaaaaaaaaa project=bbbbbbbbbbb", "    key=ccccccccccccccccccccccc"]
    stream = start(format="console")
    log.info("experiment started", queue="q" * 500)
    assert len(stream.getvalue().splitlines()) == 1


def test_libraries_are_heard_when_they_warn(start):
    stream = start(format="json", level="debug")
    logging.getLogger("pika.connection").info("noise")
    logging.getLogger("uvicorn.error").info("noise")
    logging.getLogger("asyncio").info("told")
    logging.getLogger("urllib3").debug("noise")
    bad = logging.LogRecord("any", 33, "file", 1, "does not %d fit", ("x",), None)
    logs._Forward().emit(bad)  # not through the root logger, where pytest's own handler would raise
    assert [(record["logger"], record["event"]) for record in records(stream)] == [
        ("asyncio", "told"),
        ("any", "does not %d fit"),
    ]
    stream = start(format="json")
    logging.getLogger("asyncio").info("noise")
    logging.getLogger("pika").error("lost")
    assert [record["event"] for record in records(stream)] == [
        "lost"
    ]  # once: configure replaced its own handler


async def read_all(fd, count):
    data = b""
    while data.count(b"\n") < count:
        data += await asyncio.to_thread(os.read, fd, 65536)
    return data.decode().splitlines()


async def test_a_reader_that_stalls_does_not_stop_the_daemon(monkeypatch):
    monkeypatch.setattr(sinks, "PENDING_BYTES", 200_000)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as source:
        logs.configure(config.Logs(format="json"), stream)
        for number in range(
            3000
        ):  # far more than a pipe and the limit hold; a blocking write would hang here
            log.info("x" * 100, number=number)
        lines = [json.loads(line) for line in await read_all(source.fileno(), 500)]
        while lines[-1]["event"] == "x" * 100:
            lines += [json.loads(line) for line in await read_all(source.fileno(), 1)]
    *kept, last = lines
    assert [record["number"] for record in kept] == list(range(len(kept)))
    assert last["event"].startswith("log lines dropped")
    assert last["count"] == 3000 - len(kept)


def test_a_reader_that_is_gone_does_not_either():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        logs.configure(config.Logs(format="json"), stream)
        log.info("heard")
        os.close(reader)
        for _ in range(3):
            log.info("unheard")
        logs.flush(0)


def test_flush_waits_for_the_reader_but_not_for_ever():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader):
        logs.configure(config.Logs(format="json"), stream)
        log.info("y" * 200_000)
        logs.flush(0.05)
