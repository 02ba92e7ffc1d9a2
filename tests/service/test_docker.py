"""Programs in containers of a real engine: what the executor's flags do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import zipfile
from typing import TYPE_CHECKING

import pytest

from runner import config, errors
from runner.executors import docker_archive
from runner.executors.base import Image, Limits, RunSpec
from runner.executors.docker import DockerExecutor
from runner.process.base import Command
from runner.process.spawner import Spawner
from runner.resources import usage
from tests.servers import docker as docker_server_module
from tests.servers.docker import GREETER, PYTHON

if TYPE_CHECKING:
    import pathlib

    from runner.executors.base import Prepared
    from runner.process.base import ProcessExit
    from tests.servers.docker import DockerServer

pytestmark = pytest.mark.service
LIMIT_SECS = 90.0


class Place:
    """A run's directory, and an executor on the engine."""

    def __init__(
        self, tmp_path: pathlib.Path, docker: DockerServer, spawner: Spawner, **changes: str
    ) -> None:
        self.docker = docker
        self.spawner = spawner
        self.root = tmp_path / "runs" / "abc.0"
        self.workspace = self.root / "experiments" / "abc.0" / "workspace"
        for directory in (
            self.workspace,
            self.root / "tmp",
            self.root / "_runner",
            self.workspace.parent / "modeldir",
        ):
            directory.mkdir(parents=True)
        self.log = self.root / "_runner" / "environment.log"
        self.output = tmp_path / "output"
        self.state_dir = tmp_path / "state"
        self.state_dir.mkdir()
        self.executor = DockerExecutor(
            config.Containers(**changes), self.state_dir, spawner, environ=os.environ | docker.env
        )

    def spec(self, script: str = "", *args: str, image: Image | None = None, **more: object) -> RunSpec:
        (self.workspace / "main.py").write_text(script)
        values: dict[str, object] = {"filename": "main.py", "env": {"TMPDIR": str(self.root / "tmp")}} | more
        return RunSpec(
            run_dir=self.root,
            workspace=self.workspace,
            args=args,
            image=image or Image(engine="docker", reference=PYTHON),
            **values,  # type: ignore[arg-type]
        )

    def command(self, prepared: Prepared) -> Command:
        return Command(argv=prepared.argv, env=prepared.env, cwd=self.workspace, output=self.output)

    async def run(self, spec: RunSpec) -> ProcessExit:
        async with asyncio.timeout(LIMIT_SECS), self.executor.prepare(spec, self.log) as prepared:
            ended = await self.spawner.run(self.command(prepared))
            assert prepared.verdict is not None
            return await prepared.verdict(ended)

    def said(self) -> str:
        return self.output.read_text()


def name_of(prepared: Prepared) -> str:
    return prepared.cleanup[-1]


@pytest.fixture
async def place(tmp_path, docker):
    spawner = Spawner()
    # The engine of the tests has no networks; it would say so in the output.
    yield Place(tmp_path, docker, spawner, network="none")
    await spawner.aclose()


async def until(claim) -> None:
    async with asyncio.timeout(LIMIT_SECS):
        while not claim():
            await asyncio.sleep(0.05)


async def test_a_script_runs_in_the_runs_directory_as_the_runners_user(place):
    script = """
import os, sys, tempfile
print(os.getcwd(), os.getuid(), os.getgid(), sys.argv[1:], os.environ["GREETING"], tempfile.gettempdir())
open("../modeldir/model", "w").write("trained")
tempfile.NamedTemporaryFile("w", dir="/tmp", delete=False, prefix="left").close()
"""
    env = {"GREETING": "good day = all", "TMPDIR": str(place.root / "tmp")}
    ended = await place.run(place.spec(script, "--a", "two words", env=env))
    assert (ended.code, ended.oom) == (0, "")
    assert place.said().strip() == (
        f"{place.workspace} {os.geteuid()} {os.getegid()} ['--a', 'two words'] good day = all {place.root / 'tmp'}"
    )
    assert (place.workspace.parent / "modeldir" / "model").read_text() == "trained"
    assert list((place.root / "tmp").glob("left*"))  # /tmp counts as the run's disk
    assert {each.stat().st_uid for each in place.root.rglob("*")} == {os.geteuid()}
    assert place.docker.containers() == []


async def test_what_a_container_may_not(place):
    script = """
import os, pathlib
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
print(status["CapEff"].strip(), status["CapBnd"].strip(), status["NoNewPrivs"].strip())
print(pathlib.Path("/proc/1/cmdline").read_bytes().split(b"\\0")[0].decode().rsplit("/")[-1])
print(sorted(os.listdir(os.environ["RUN"])), os.listdir(os.environ["RUN"] + "/_runner"))
print(os.path.exists(os.environ["OUTSIDE"]), "SECRET_OF_RUNNER" in os.environ)
"""
    (place.root / "_runner" / "request.json").write_text("the message")
    env = {"RUN": str(place.root), "OUTSIDE": str(place.state_dir)}
    place.executor._environ = {**place.executor._environ, "SECRET_OF_RUNNER": "x"}
    assert (await place.run(place.spec(script, env=env))).ok
    rights, init, listing, outside = place.said().splitlines()
    assert rights == f"{0:016x} {0:016x} 1"
    assert init == "docker-init"
    assert listing == "['_runner', 'env', 'experiments', 'tmp'] []"
    assert outside == "False False"


@pytest.mark.parametrize("code", [0, 3, 200])
async def test_the_exit_code_is_the_engines(place, code):
    ended = await place.run(place.spec(f"raise SystemExit({code})"))
    assert (ended.code, ended.error, ended.oom) == (code, None, "")


async def test_limits_are_there(place):
    script = """
import pathlib
def read(*names):
    for name in names:
        if (path := pathlib.Path("/sys/fs/cgroup", name)).exists():
            return path.read_text().strip()
print(read("memory/memory.limit_in_bytes", "memory.max"), read("pids/pids.max", "pids.max"))
print(read("cpu/cpu.cfs_quota_us", "cpu.max"), read("cpu/cpu.cfs_period_us"))
print(__import__("shutil").disk_usage("/dev/shm").total)
"""
    if not place.docker.memory_limits:
        pytest.skip("this kernel lets nobody limit memory")
    assert (await place.run(place.spec(script, limits=Limits(cpus=1, ram_bytes=256 << 20)))).ok
    memory, cpu, shm = place.said().splitlines()
    assert memory == f"{256 << 20} 8192"
    assert cpu.replace("None", "").split() == ["100000", "100000"]
    assert int(shm) == 128 << 20


async def test_out_of_memory_is_told_with_the_limit(place):
    if not place.docker.memory_limits:
        pytest.skip("this kernel lets nobody limit memory")
    ended = await place.run(place.spec("x = b'x' * (1 << 30)", limits=Limits(ram_bytes=64 << 20)))
    assert ended.code == 137
    assert ended.oom == "the container was at its limit of 0.0671 GB of memory"


async def test_variables_of_every_kind_arrive_and_none_reaches_the_client(place):
    script = "import json, os; print(json.dumps({name: os.environ.get(name) for name in json.loads(os.environ['NAMES'])}))"
    odd = {
        "LINES": "a line\nand-another\n",
        "LONG": "x" * 100_000,
        "QUOTED": "'a' \"b\" $HOME `id` #no",
        "BLANK": "",
        "LD_PRELOAD": "/nothing.so",
        "DOCKER_HOST": "tcp://nowhere:1",
        "UMLAUT": "ä€",
    }
    import json

    env = {**odd, "NAMES": json.dumps(list(odd))}
    async with place.executor.prepare(place.spec(script, env=env), place.log) as prepared:
        assert "and-another" not in "".join(prepared.argv)
        assert {"LD_PRELOAD", "LINES"}.isdisjoint(prepared.env)
        assert prepared.env["DOCKER_HOST"] == place.docker.host
        modes = [path.stat().st_mode & 0o77 for path in place.root.rglob("*env*") if path.is_file()]
        assert not any(modes)
        assert (await place.spawner.run(place.command(prepared))).ok
    line = next(line for line in place.said().splitlines() if line.startswith("{"))
    assert json.loads(line) == odd


async def test_an_image_runs_its_own_program(place):
    (place.workspace.parent / "modeldir" / "in").write_text("from outside\n")
    image = Image(engine="docker", reference=f"docker://{GREETER}")
    ended = await place.run(place.spec("", "a", "b c", filename=None, image=image))
    assert ended.ok
    assert place.said() == "hello from the image\ngiven: a b c\nfrom outside\n"
    assert (place.workspace.parent / "modeldir" / "out").read_text() == "x\n"


async def test_an_image_that_came_as_a_file_is_loaded_under_no_name_of_others(place, tmp_path):
    place.docker.docker("tag", PYTHON, "test/victim:1", check=True)
    place.docker.docker("tag", GREETER, "test/attacker:1", check=True)
    archive = tmp_path / "image.tar"
    # An archive that wants to be called what others use.
    place.docker.docker("tag", GREETER, "test/victim:1", check=True)
    place.docker.docker("save", "--output", str(archive), "test/victim:1", check=True)
    place.docker.docker("tag", PYTHON, "test/victim:1", check=True)
    before = place.docker.docker("image", "inspect", "--format", "{{.Id}}", "test/victim:1").stdout
    (place.workspace.parent / "modeldir" / "in").write_text("read\n")
    ended = await place.run(place.spec("", filename=None, image=Image(engine="docker", file=archive)))
    assert ended.ok
    assert "hello from the image\n" in place.said()
    assert place.docker.docker("image", "inspect", "--format", "{{.Id}}", "test/victim:1").stdout == before
    names = place.docker.docker("images", "--format", "{{.Repository}}").stdout.split()
    assert "localhost/studio-runner-loaded" in names


async def test_images_that_came_as_files_go_when_no_run_has_used_them_for_a_day(place, tmp_path):
    place.docker.docker("create", "--name", "made", GREETER, check=True)
    place.docker.docker("commit", "made", "test/own:1", check=True)
    archive = tmp_path / "image.tar"
    place.docker.docker("save", "--output", str(archive), "test/own:1", check=True)
    place.docker.docker("rm", "made", check=True)
    place.docker.docker("rmi", "test/own:1", check=True)
    name = docker_archive.name_of(archive)

    def age() -> None:
        os.utime(place.state_dir / "container-images" / name.rpartition(":")[2], (0, 0))

    def is_there() -> bool:
        return not place.docker.docker("image", "inspect", name).returncode

    spec = place.spec("", filename=None, image=Image(engine="docker", file=archive))
    async with place.executor.prepare(spec, place.log):
        age()
        await place.executor.tidy()
        assert is_there()  # a run has it
    place.docker.docker("create", "--name", "of-another", name, check=True)
    age()
    await place.executor.tidy()
    assert is_there()  # somebody's container is of it
    place.docker.docker("rm", "of-another", check=True)
    await place.executor.tidy()
    assert is_there()
    age()
    await place.executor.tidy()
    assert not is_there()
    assert not place.docker.docker("image", "inspect", GREETER).returncode


async def test_requirement_lines_are_installed_by_the_images_pip_into_the_run(place):
    if docker_server_module.pip_wheel() is None:
        pytest.skip("this Python brings no pip along for the image")
    wheel = place.workspace / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing.py", "WHAT = 'a thing'\n")
        archive.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr(
            "thing-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    script = "import thing; print(thing.WHAT, thing.__file__)"
    assert (await place.run(place.spec(script, requirements=(f"./{wheel.name}",)))).ok
    assert place.said().startswith(f"a thing {place.root}/env/lib/")
    assert "Successfully installed thing-1.0" in place.log.read_text()


async def test_images_that_cannot_be_had(place):
    with pytest.raises(
        errors.Unreachable, match=r"registry of the image 127\.0\.0\.1:1/x:1 does not answer"
    ) as away:
        await place.run(place.spec(image=Image(engine="docker", reference="127.0.0.1:1/x:1")))
    assert away.value.endpoint == "127.0.0.1:1"
    assert "connection refused" in place.log.read_text()
    file = place.workspace / "no.tar"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(errors.ArchiveRefused, match="no archive that `docker save` writes"):
        await place.run(place.spec(image=Image(engine="docker", file=file)))


async def test_a_program_that_is_not_in_the_image_ends_as_in_a_shell(place):
    ended = await place.run(place.spec("", "/no/such/program", filename=None))
    assert (ended.code, ended.error) == (127, None)
    assert "/no/such/program" in place.said()


async def test_what_the_engine_refuses_is_told_in_its_words(place):
    place.executor._config = config.Containers(network="no-such-network")
    with pytest.raises(errors.EnvironmentFailed, match=r"docker c.*: (?s:.*)no-such-network"):
        await place.run(place.spec("", "/bin/id", filename=None))
    assert place.docker.containers() == []


async def test_cards_that_the_engine_cannot_give_are_for_other_hosts(place):
    spec = place.spec("", "/bin/id", filename=None, limits=Limits(gpus=("GPU-0",)))
    with pytest.raises(errors.NoEngine, match=r"docker c.*: (?s:.*)[gG][pP][uU]"):
        await place.run(spec)
    assert place.docker.containers() == []


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, {how})
print("begun", flush=True)
while True: time.sleep(0.05)
"""


async def test_the_engine_tells_where_a_program_runs_and_it_is_measured_there(place):
    script = """
import os, time
held = bytearray(b"x") * (60 << 20)
if os.fork() == 0:
    os.setsid()
    held[:] = b"y" * len(held)
print("begun", flush=True)
time.sleep(600)
"""
    env = {"TMPDIR": str(place.root / "tmp"), "STUDIOML_HOME": str(place.root)}
    async with place.executor.prepare(place.spec(script, env=env), place.log) as prepared:
        assert prepared.first is not None
        assert await prepared.first() is None  # there is no container yet
        process = await place.spawner.start(place.command(prepared))
        await until(lambda: place.output.exists() and place.said().count("begun") == 2)
        first = await prepared.first()
        assert first is not None
        (sample,) = usage.look([(first, 0)])
        assert len(sample.pids) == 3  # the init, and two
        assert 120 << 20 < sample.memory_bytes < 200 << 20
        await process.stop(0)
    assert await prepared.first() is None
    assert usage.look([(first, 0)])[0].pids == ()


async def test_term_reaches_the_program(place):
    how = "lambda *_: (print('asked to end', flush=True), sys.exit(7))"
    async with place.executor.prepare(place.spec(SLEEPER.format(how=how)), place.log) as prepared:
        process = await place.spawner.start(place.command(prepared))
        await until(lambda: place.output.exists() and "begun" in place.said())
        await process.stop(60)
    assert "asked to end" in place.said()
    assert place.docker.containers() == []


async def test_a_program_that_ignores_term_ends_with_its_container(place):
    async with place.executor.prepare(
        place.spec(SLEEPER.format(how="signal.SIG_IGN")), place.log
    ) as prepared:
        process = await place.spawner.start(place.command(prepared))
        await until(lambda: place.output.exists() and "begun" in place.said())
        await process.stop(0.1)
        # The client is dead, the container is not: now that of the supervisor, which leaves it to be asked.
        assert (
            subprocess.run(
                prepared.cleanup, env=dict(prepared.env), capture_output=True, check=False
            ).returncode
            == 0
        )
        name = name_of(prepared)
        state = place.docker.docker("container", "inspect", "--format", "{{.State.Status}}", name).stdout
        assert state.strip() == "exited"
    assert place.docker.containers() == []


async def test_a_client_that_dies_is_no_end_of_the_program(place):
    async with place.executor.prepare(
        place.spec(SLEEPER.format(how="signal.SIG_DFL")), place.log
    ) as prepared:
        process = await place.spawner.start(place.command(prepared))
        await until(lambda: place.output.exists() and "begun" in place.said())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        ended = await process.wait()
        assert prepared.verdict is not None
        with pytest.raises(errors.ProcessLost, match="let go of a container that was running"):
            await prepared.verdict(ended)
    assert place.docker.containers() == []


async def test_an_engine_that_is_restarted_is_no_failure_of_the_run(place):
    async with place.executor.prepare(
        place.spec(SLEEPER.format(how="signal.SIG_DFL")), place.log
    ) as prepared:
        process = await place.spawner.start(place.command(prepared))
        await until(lambda: place.output.exists() and "begun" in place.said())
        await asyncio.to_thread(place.docker.stop)
        ended = await process.wait()
        verdict = asyncio.create_task(_verdict(prepared, ended))
        await asyncio.to_thread(place.docker.start)
        with pytest.raises(errors.Unreachable, match="was stopped, and its containers with it"):
            await verdict
    assert place.docker.containers() == []


async def _verdict(prepared: Prepared, ended: ProcessExit) -> ProcessExit:
    assert prepared.verdict is not None
    return await prepared.verdict(ended)


async def test_what_an_earlier_daemon_left_is_removed_and_nothing_else(place, tmp_path):
    label = await asyncio.to_thread(place.executor._label)
    ours = ("--label", f"studio-runner.owner={label}", "--name", "studio-runner-left-1")
    another = ("--label", "studio-runner.owner=another", "--name", "studio-runner-another-1")
    for flags in (ours, another):
        place.docker.docker("run", "--detach", *flags, PYTHON, "/bin/sleep", "600", check=True)
    async with place.executor.prepare(
        place.spec(SLEEPER.format(how="signal.SIG_DFL")), place.log
    ) as prepared:
        assert place.docker.containers() == ["studio-runner-another-1"]
        process = await place.spawner.start(place.command(prepared))
        await until(lambda: place.output.exists() and "begun" in place.said())
        await place.executor.reap()
        assert name_of(prepared) in place.docker.containers()
        await process.stop(0)


async def test_cancelled_while_it_is_made_ready_leaves_nothing(place):
    preparing = asyncio.create_task(place.run(place.spec("import time; time.sleep(600)")))
    await until(place.docker.containers)
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    assert place.docker.containers() == []


async def test_an_image_that_is_not_here_is_left_to_others_before_anything_is_fetched(place):
    executor = DockerExecutor(
        config.Containers(pull="never"), place.state_dir, place.spawner, environ=place.executor._environ
    )
    await executor.vet(Image(engine="docker", reference=PYTHON))
    with pytest.raises(errors.NoEngine, match=r"127\.0\.0\.1:1/x:1 is not on this host"):
        await executor.vet(Image(engine="docker", reference="127.0.0.1:1/x:1"))


async def test_an_engine_that_is_away_is_unreachable(place, tmp_path):
    environ = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/nobody.sock"}
    executor = DockerExecutor(config.Containers(), place.state_dir, place.spawner, environ=environ)
    with pytest.raises(errors.Unreachable, match=r"docker does not answer: .*nobody\.sock"):
        async with executor.prepare(place.spec("print(1)"), place.log):
            pass
    for image in (Image(engine="docker", reference=PYTHON), Image(engine="docker", file=place.workspace)):
        with pytest.raises(errors.Unreachable, match=r"docker does not answer: .*nobody\.sock"):
            await executor.vet(image)
