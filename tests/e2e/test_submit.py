"""`studio-runner submit` as a real process, against a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers.daemon import PROGRAM, clean_environment
from tests.servers.faulty_http import Fault
from tests.servers.seaweedfs import ADMIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.faulty_http import FaultyHttp
    from tests.servers.rabbitmq import RabbitmqServer
    from tests.servers.seaweedfs import SeaweedFs

LIMIT_SECS = 200


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "src"
    directory.mkdir()
    (directory / "main.py").write_text(
        textwrap.dedent("""\
            import json, os, pathlib, signal, sys, time
            print("hello", *sys.argv[1:], flush=True)
            print(json.dumps({"experiment": {"loss": 0.5}}), flush=True)
            if sys.argv[1:2] == ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if sys.argv[1:2] == ["sleep"]:
                pathlib.Path(sys.argv[2]).touch()
                time.sleep(600)
            if sys.argv[1:2] == ["loud"]:
                sys.stdout.buffer.write(b"x\\xff\\r\\n" * 1_000_000)
            if sys.argv[1:2] == ["back"]:
                pathlib.Path("../kept/b").write_text(pathlib.Path("../kept/a").read_text() + os.listdir("../data")[0])
            pathlib.Path("../modeldir/m.txt").write_text("model")
            print("the end", end="")
            sys.exit(int(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdigit() else 0)
            """)
    )
    return directory


def submit(
    source: Path, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [str(PROGRAM), "submit", str(source), *arguments],
        env=clean_environment() | dict(env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT_SECS,
        check=False,
        cwd=cwd,
    )


def to(daemon: Daemon, *arguments: str) -> list[str]:
    return [f"--working-dir={daemon.working_dir}", "--queue=local_a", *arguments]


@pytest.fixture
def daemon(daemons: MakeDaemon) -> Daemon:
    made = daemons(start=False)
    (made.queue_root / "local_a").mkdir()
    made.start()
    return made


def test_waiting_streams_the_output_and_exits_with_the_programs_code(daemon: Daemon, source: Path):
    told = b""
    for code in (0, 3):
        done = submit(source, *to(daemon, "--wait", "--", "main.py", str(code), "two words", "it's"))
        expected = f'hello {code} two words it\'s\n{{"experiment": {{"loss": 0.5}}}}\nthe end'
        assert done.stdout.decode() == expected, done.stderr.decode()
        assert done.returncode == code
        assert b"submitted " in (told := done.stderr)
    assert b"failed (exit)" in told
    assert not daemon.waiting("local_a")


def test_a_program_that_was_killed_gives_what_a_shell_would(daemon: Daemon, source: Path):
    done = submit(source, *to(daemon, "--wait", "--", "main.py", "die"))
    assert done.returncode == 128 + signal.SIGKILL, done.stderr.decode()
    assert done.stdout.startswith(b"hello die\n")
    assert b"signal" in done.stderr


def test_what_the_runner_stops_is_one_and_said_why(daemon: Daemon, source: Path, tmp_path: Path):
    arguments = to(daemon, "--wait", "--max-duration=3s", "--", "main.py", "sleep", str(tmp_path / "began"))
    done = submit(source, *arguments)
    assert done.returncode == 1
    assert b"timeout" in done.stderr
    assert b"max_duration" in done.stderr
    assert b"max_duration" in done.stdout  # the closing line of the output


def test_nothing_of_a_large_output_is_lost(daemon: Daemon, source: Path):
    done = submit(source, *to(daemon, "--wait", "--", "main.py", "loud"))
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.endswith(b"x\xff\r\n" * 1_000_000 + b"the end")


def test_json_has_one_event_a_line(daemon: Daemon, source: Path):
    done = submit(
        source, *to(daemon, "--wait", "--json", "--project=p", "--experiment=again", "--", "main.py", "4")
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 4
    assert done.stderr == b""
    assert events[0]["event"] == "submitted"
    assert events[0]["experiment"] == "again"
    stages = {"queued", "starting", "staging", "environment", "running", "uploading"}
    assert {event["stage"] for event in events if event["event"] == "stage"} <= stages
    assert "".join(event["text"] for event in events if event["event"] == "output").endswith("the end")
    assert [event["values"] for event in events if event["event"] == "metric"] == [{"loss": 0.5}]
    assert (events[-1]["event"], events[-1]["exit_code"], events[-1]["code"]) == ("end", 4, 4)
    document = final_document(daemon)
    assert document["studioml"]["experiment"] == "again"
    assert document["studioml"]["project"] == "p"


def test_a_key_may_be_used_again(daemon: Daemon, source: Path):
    for code in ("5", "6"):
        done = submit(source, *to(daemon, "--wait", "--experiment=same", "--", "main.py", code))
        assert done.returncode == int(code)


def test_captured_directories_go_along_and_come_back(daemon: Daemon, source: Path, tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("was there, ")
    (tmp_path / "d.csv").write_text("1,2")
    done = submit(
        source,
        *to(daemon, "--wait", "--experiment=cap", "--capture=kept:kept", "--capture-once=d.csv:data"),
        *("--", "main.py", "back"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr.decode()
    listed = subprocess.run(
        ["tar", "-xOf", str(daemon.storage / "experiments/cap/kept.tar"), "./b"],
        capture_output=True,
        check=True,
    )
    assert listed.stdout == b"was there, d.csv"


def test_an_environment_that_cannot_be_built_is_tried_again_and_then_told(daemon: Daemon, source: Path):
    done = submit(source, *to(daemon, "--wait", "--json", "--pip=no such line ==", "--", "main.py"))
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert events[-1]["event"] == "end"
    assert events[-1]["exit_code"] is None


def test_a_message_that_never_ran_is_told_as_well(daemon: Daemon, source: Path):
    done = submit(source, *to(daemon, "--wait", "--python=2.3", "--", "main.py"))
    assert done.returncode == 1
    assert b"2.3" in done.stderr
    assert len(daemon.dead_letters()) == 1


@contextlib.contextmanager
def submitting(source: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A submission in the background; killed, should the test fail before it has ended."""
    argv = [str(PROGRAM), "submit", str(source), *arguments]
    with subprocess.Popen(
        argv, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
            process.wait(LIMIT_SECS)
        finally:
            process.kill()


def test_why_it_waits_is_told_once(daemon: Daemon, source: Path):
    with submitting(source, *to(daemon, "--cpus=5000", "--wait", "--", "main.py")) as waiting:
        daemon.until(lambda: daemon.log("left to other hosts"))
        told = b""
        assert waiting.stderr is not None
        while b"5000 cores" not in told:
            line = waiting.stderr.readline()
            assert line, told.decode()
            told += line
        # Some more looks: the countdown within the reason goes on meanwhile.
        seen: set[str] = set()

        def counted_down() -> bool:
            seen.add(daemon.get("/api/queues")["queues"][0]["closed_because"])
            return len(seen) > 2

        daemon.until(counted_down)
        waiting.send_signal(signal.SIGINT)
        told += waiting.stderr.read()
    assert told.count(b"5000 cores") == 1, told.decode()
    assert waiting.returncode == 130


def test_ctrl_c_leaves_the_experiment_alone(daemon: Daemon, source: Path, tmp_path: Path):
    began = tmp_path / "began"
    with submitting(source, *to(daemon, "--wait", "--", "main.py", "sleep", str(began))) as waiting:
        daemon.until(began.exists)
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=LIMIT_SECS)
    assert waiting.returncode == 130
    assert b"goes on" in told
    assert b"Traceback" not in told
    assert [run["stage"] for run in daemon.get("/api/runs")["running"]] == ["running"]


def test_a_daemon_that_is_killed_meanwhile_is_found_again(daemon: Daemon, source: Path, tmp_path: Path):
    """The second attempt is by another process at another port; its output is printed from its beginning."""
    (source / "once.py").write_text(
        f"import pathlib, time\nprint('begun', flush=True)\nhere = pathlib.Path({str(tmp_path / 'began')!r})\n"
        "again = here.exists()\nhere.touch()\nif not again: time.sleep(600)\nprint('done')"
    )
    with submitting(source, *to(daemon, "--wait", "--", "once.py")) as waiting:
        daemon.until((tmp_path / "began").exists)
        daemon.kill()
        daemon.start()
        printed, told = waiting.communicate(timeout=LIMIT_SECS)
    assert waiting.returncode == 0, told.decode()
    assert printed.endswith(b"begun\ndone\n")


def test_without_a_daemon_to_ask_the_storage_tells(daemons: MakeDaemon, source: Path, tmp_path: Path):
    """As on another machine: the working directory that is named has no daemon."""
    daemon = daemons(start=False)
    (daemon.queue_root / "local_a").mkdir()
    daemon.start()
    elsewhere = [
        f"--working-dir={tmp_path / 'elsewhere'}",
        f"--queue-root={daemon.queue_root}",
        "--queue=local_a",
    ]
    done = submit(source, *elsewhere, f"--storage={daemon.storage}", "--wait", "--", "main.py", "9")
    assert done.returncode == 9, done.stderr.decode()
    assert done.stdout.endswith(b"the end")


def test_a_daemon_behind_a_token_is_asked_with_it(daemons: MakeDaemon, source: Path):
    daemon = daemons("--http-token=tell-nobody", start=False)
    (daemon.queue_root / "local_a").mkdir()
    daemon.start()
    given = [f"--working-dir={daemon.working_dir}", "--queue=local_a", f"--address={daemon.address}"]
    done = submit(source, *given, "--wait", "--", "main.py", env={"HTTP_TOKEN": "tell-nobody"})
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--queue=sqs_a", "--", "main.py"], "SQS"),
        (["--queue=rmq_a", "--", "main.py"], "--amqp-url"),
        (["--queue=rmq_a", "--amqp-url=amqp://h", "--", "main.py"], "--storage"),
        (["--queue=rmq_a", "--amqp-url=http://u:hidden@h", "--", "main.py"], "amqp"),
        (["--queue=local_a", "--", "none.py"], "none.py"),
        (["--queue=local_a", "--ram=lots", "--", "main.py"], "--ram"),
        (["--queue=local_a", "--max-duration=long", "--", "main.py"], "--max-duration"),
        (["--queue=local_a", "--env=NAME", "--", "main.py"], "--env"),
        (["--queue=local_a", "--image=-v /:/host", "--", "main.py"], "--image"),
        (["--queue=local_a", "--cpus=-1", "--", "main.py"], "--cpus"),
        (["--queue=local_a", "--python=new", "--", "main.py"], "--python"),
        (["--queue=local_a", "--requirements=none.txt", "--", "main.py"], "none.txt"),
        (["--queue=local_a", "--storage=gs://b", "--", "main.py"], "--storage"),
        (["--queue=local_a"], "SCRIPT"),
        (["--", "main.py"], "--queue"),
    ],
)
def test_refused_inputs_exit_with_two_and_send_nothing(
    source: Path, tmp_path: Path, arguments: list[str], said: str
):
    done = submit(source, f"--working-dir={tmp_path / 'work'}", *arguments)
    assert done.returncode == 2, done.stderr.decode()
    assert said in done.stderr.decode()
    assert "hidden" not in done.stderr.decode()
    assert not (tmp_path / "work").exists()


def test_the_runners_own_directory_is_not_packed(source: Path):
    (source / ".work" / "state").mkdir(parents=True)
    done = submit(source, f"--working-dir={source / '.work'}", "--queue=local_a", "--", "main.py")
    assert done.returncode == 2
    assert b"keep the two apart" in done.stderr


def test_half_a_key_pair_is_refused(source: Path, tmp_path: Path):
    env = {"AWS_ACCESS_KEY_ID": "AK"}
    done = submit(source, f"--working-dir={tmp_path}", "--queue=local_a", "--", "main.py", env=env)
    assert done.returncode == 2
    assert b"AWS_SECRET_ACCESS_KEY" in done.stderr


# -- RabbitMQ and S3


def secrets() -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": ADMIN.access_key, "AWS_SECRET_ACCESS_KEY": ADMIN.secret_key}


@pytest.mark.service
@pytest.mark.parametrize("persistent", [False, True])
def test_rabbitmq_and_s3(
    daemons: MakeDaemon, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, source: Path, persistent: bool
):
    queue = f"rmq_submit_{os.getpid()}_{'durable' if persistent else 'transient'}"
    bucket = seaweedfs.make_bucket("submitted")
    given = [
        f"--queue={queue}",
        f"--amqp-url={rabbitmq.amqp_url}",
        f"--storage=http://{seaweedfs.endpoint}/{bucket}",
    ]
    given += ["--persistent"] if persistent else []
    queued = submit(source, *given, "--", "main.py", env=secrets())
    assert queued.returncode == 0, queued.stderr.decode()
    _, properties, body = rabbitmq.get(queue)
    assert properties.delivery_mode == (2 if persistent else None)
    assert (properties.content_type, properties.app_id) == ("application/json", "studioml")
    assert body is not None
    assert rabbitmq.api("GET", f"/api/queues/%2F/{queue}")[1]["durable"] is persistent
    config = json.loads(body)["config"]
    assert config["cloud"]["queue"] == {"rmq": rabbitmq.amqp_url} | (
        {"persistent": True} if persistent else {}
    )

    env = {
        "AMQP_URL": rabbitmq.amqp_url,
        "AMQP_MGT_URL": rabbitmq.management_url,
        "QUEUE_MATCH": f"^{queue}$",
    }
    daemon = daemons("--queue-refresh=1s", env=env)
    done = submit(
        source, *given, f"--working-dir={daemon.working_dir}", "--wait", "--", "main.py", "3", env=secrets()
    )
    assert done.returncode == 3, done.stderr.decode()
    assert done.stdout.endswith(b"the end")
    assert ADMIN.secret_key not in daemon.log_text()

    # Nobody to ask: as on the experimenter's own machine.
    done = submit(
        source,
        *given,
        f"--working-dir={source.parent / 'none'}",
        "--wait",
        "--",
        "main.py",
        "4",
        env=secrets(),
    )
    assert done.returncode == 4, done.stderr.decode()
    assert done.stdout.endswith(b"the end")
    rabbitmq.delete(queue)


@pytest.mark.service
def test_an_existing_queue_is_used_as_it_is(rabbitmq: RabbitmqServer, source: Path, tmp_path: Path):
    env = {"AMQP_URL": rabbitmq.amqp_url}
    storage = f"--storage={tmp_path / 'storage'}"
    for durable, options in ((False, ["--persistent"]), (True, [])):
        queue = f"rmq_existing_{os.getpid()}_{durable}"
        with rabbitmq.channel() as channel:
            channel.queue_declare(queue, durable=durable)
        done = submit(source, f"--queue={queue}", storage, *options, "--", "main.py", env=env)
        assert done.returncode == 0, done.stderr.decode()
        assert rabbitmq.get(queue)[1].delivery_mode == (2 if durable else None)
        assert (b"transient" in done.stderr) == (not durable)
        rabbitmq.delete(queue)
    queue = f"rmq_quorum_{os.getpid()}"
    with rabbitmq.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    done = submit(source, f"--queue={queue}", storage, "--", "main.py", env=env)
    assert done.returncode == 0, done.stderr.decode()
    assert rabbitmq.get(queue)[1].delivery_mode == 2
    rabbitmq.delete(queue)


@pytest.mark.service
def test_storage_that_refuses_is_told_and_nothing_is_published(
    rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, faulty_http: FaultyHttp, source: Path
):
    # SeaweedFS makes the bucket that is missing; other servers say this.
    faulty_http.always = Fault(status=404, body=b"<Error><Code>NoSuchBucket</Code></Error>")
    queue = f"rmq_refused_{os.getpid()}"
    given = [f"--queue={queue}", f"--amqp-url={rabbitmq.amqp_url}"]
    missing = f"--storage=http://{faulty_http.endpoint}/there-is-none"
    for env, storage, said in (
        (secrets(), missing, "no bucket there-is-none"),
        (
            secrets() | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"},
            f"--storage=http://{seaweedfs.endpoint}/public",
            "secret",
        ),
        ({}, f"--storage=http://{seaweedfs.endpoint}/public", "not set"),
    ):
        done = submit(source, *given, storage, "--", "main.py", env=env)
        assert done.returncode == 1
        assert said in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()
        assert "not-the-secret" not in done.stderr.decode()
    assert rabbitmq.api("GET", f"/api/queues/%2F/{queue}")[0] == 404


@pytest.mark.service
def test_a_broker_that_is_away_is_told_before_anything_is_uploaded(source: Path, tmp_path: Path):
    given = ["--queue=rmq_a", "--amqp-url=amqp://u:hidden@127.0.0.1:1/", f"--storage={tmp_path / 'storage'}"]
    done = submit(source, *given, "--", "main.py")
    assert done.returncode == 1
    assert b"127.0.0.1:1" in done.stderr
    assert b"hidden" not in done.stderr
    assert not (tmp_path / "storage").exists()


def final_document(daemon: Daemon) -> dict[str, Any]:
    (path,) = (daemon.storage / "metadata").glob("scrape-host-*.json")
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document
