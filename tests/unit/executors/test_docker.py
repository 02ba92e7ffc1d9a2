"""The command lines of containers, on the recording double: what they do is tested on a real engine (tests/service/test_docker.py)."""

from __future__ import annotations

import asyncio
import os
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from runner import config, errors
from runner.executors import docker as docker_module
from runner.executors import docker_container
from runner.executors.base import Executor, Image, Limits, Prepared, RunSpec
from runner.executors.docker import DockerExecutor
from runner.executors.registry import Executors
from runner.process.base import ProcessExit
from runner.process.spawner import Spawner
from runner.resources import probe, usage
from tests.servers.docker_double import ENDED, IMAGE, DockerDouble

if TYPE_CHECKING:
    import pathlib

ID = str(IMAGE["Id"])


class Place:
    def __init__(self, tmp_path: pathlib.Path, spawner: Spawner) -> None:
        self.tmp_path = tmp_path
        self.spawner = spawner
        self.root = tmp_path / "runs" / 'abc,".0'
        self.workspace = self.root / "experiments" / "x" / "workspace"
        self.workspace.mkdir(parents=True)
        (self.root / "_runner").mkdir()
        self.log = self.root / "_runner" / "environment.log"
        self.state_dir = tmp_path / "state"
        self.state_dir.mkdir()
        self.double = self.engine("docker")

    def engine(self, name: str) -> DockerDouble:
        directory = self.tmp_path / f"bin-{name}"
        directory.mkdir()
        return DockerDouble(directory, name)

    def executor(self, double: DockerDouble | None = None, **changes: str) -> DockerExecutor:
        own = {"PATH": str((double or self.double).directory), "HOME": "/home/me", "AMQP_URL": "canary"}
        return DockerExecutor(config.Containers(**changes), self.state_dir, self.spawner, environ=own)

    def spec(self, **fields: Any) -> RunSpec:
        image = Image(engine="docker", reference=fields.pop("reference", "python:3.11"))
        given: dict[str, Any] = {"filename": "main.py", "image": image, "env": {"A": "1"}} | fields
        return RunSpec(run_dir=self.root, workspace=self.workspace, **given)

    async def prepared(self, spec: RunSpec, executor: DockerExecutor | None = None) -> Prepared:
        async with (executor or self.executor()).prepare(spec, self.log) as prepared:
            return prepared

    async def verdict(self, ended: ProcessExit, **fields: Any) -> ProcessExit:
        async with self.executor().prepare(self.spec(**fields), self.log) as prepared:
            assert prepared.verdict is not None
            return await prepared.verdict(ended)


@pytest.fixture
async def place(tmp_path):
    spawner = Spawner()
    yield Place(tmp_path, spawner)
    await spawner.aclose()


async def test_the_whole_command_line(place):
    limits = Limits(cpus=2, ram_bytes=3 << 30, gpus=("GPU-1", "GPU-2"))
    prepared = await place.prepared(place.spec(args=("--lr", "two words", "$(id)"), limits=limits))
    root = str(place.root).replace('"', '""')
    name = prepared.cleanup[-1]
    assert prepared.argv == (
        str(place.double.program),
        "run",
        f"--name={name}",
        f"--label=studio-runner.owner={(place.state_dir / 'containers').read_text()}",
        f"--label=studio-runner.run={place.root.name}",
        f"--user={os.geteuid()}:{os.getegid()}",
        "--init",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--no-healthcheck",
        "--log-driver=none",
        "--oom-score-adj=500",
        f"--shm-size={3 << 29}",
        "--pids-limit=8192",
        "--cpus=2",
        f"--memory={3 << 30}",
        f"--memory-swap={3 << 30}",
        '--gpus="device=GPU-1,GPU-2"',
        f'--mount=type=bind,"source={root}","target={root}"',
        f'--mount=type=tmpfs,"target={root}/_runner",tmpfs-size=4096',
        f'--mount=type=bind,"source={root}/tmp",target=/tmp',
        f'--mount=type=bind,"source={root}/tmp",target=/var/tmp',
        f"--workdir={place.workspace}",
        f"--env-file={place.root}/_runner/container.env",
        "--entrypoint=python",
        ID,
        "main.py",
        "--lr",
        "two words",
        "$(id)",
    )
    assert prepared.cleanup == (str(place.double.program), "kill", name)
    assert prepared.env == {"PATH": str(place.double.directory), "HOME": "/home/me"}
    assert place.double.commands("rm") == [
        ["rm", "--force", "--volumes", name_of] for name_of in names(place)
    ]
    assert prepared.facts["image_id"] == ID


def names(place: Place) -> list[str]:
    """Those of the look for Python, and of the run."""
    return [each[-1] for each in place.double.commands("rm")]


async def test_podman_takes_other_flags_for_a_few_things(place, monkeypatch):
    podman = place.engine("podman")
    limits = Limits(gpus=("GPU-1", "GPU-2"))
    for uid, owner in ((0, ["--user=0:0"]), (1000, ["--userns=keep-id", "--user=1000:0"])):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        monkeypatch.setattr(os, "getegid", lambda: 0)
        prepared = await place.prepared(place.spec(limits=limits), place.executor(podman))
        assert [each for each in prepared.argv if each.startswith("--user")] == owner
        (hidden,) = (each for each in prepared.argv if "tmpfs" in each)
        assert hidden.endswith(",notmpcopyup")
        assert [each for each in prepared.argv if "GPU" in each] == [
            "--device=nvidia.com/gpu=GPU-1",
            "--device=nvidia.com/gpu=GPU-2",
        ]


@pytest.mark.parametrize(
    ("reference", "pulled"),
    [
        ("python:3.11", "docker.io/library/python:3.11"),
        ("docker://team/train", "docker.io/team/train"),
        ("ghcr.io/us/x:1", "ghcr.io/us/x:1"),
        ("localhost/x", "localhost/x"),
        ("host:5000/x@sha256:" + "0" * 64, "host:5000/x@sha256:" + "0" * 64),
    ],
)
async def test_a_name_means_to_podman_what_it_means_to_docker(place, reference, pulled):
    podman = place.engine("podman")
    podman.answer("image", "inspect", text="no such image", code=1)
    podman.answer("pull", text="denied: x", code=125)
    with pytest.raises(errors.UnsupportedRequest):
        await place.prepared(place.spec(reference=reference), place.executor(podman))
    assert podman.commands("pull") == [["pull", pulled]]


async def test_podman_is_asked_again_why_a_container_did_not_start(place):
    podman = place.engine("podman")
    podman.answer("container", "inspect", text=ENDED | {"Status": "created"})
    for said, error in (
        ("Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=GPU-0", errors.NoEngine),
        ("Error: no space left on device", errors.EnvironmentFailed),
    ):
        podman.answer("start", text=said, code=125)
        async with place.executor(podman).prepare(place.spec(), place.log) as prepared:
            assert prepared.verdict is not None
            with pytest.raises(error, match=said):
                await prepared.verdict(ProcessExit(code=126))


async def test_a_client_of_podman_that_was_killed_is_no_end_of_the_program(place):
    """Its container is among its children, which end with it."""
    podman = place.engine("podman")
    podman.answer("container", "inspect", text=ENDED | {"ExitCode": 137})
    async with place.executor(podman).prepare(place.spec(), place.log) as prepared:
        assert prepared.verdict is not None
        with pytest.raises(errors.ProcessLost, match="killed by signal 9, and the container with it"):
            await prepared.verdict(ProcessExit(code=None, signal=9))


@pytest.mark.parametrize(
    ("info", "flags", "absent"),
    [
        ({"SecurityOptions": ["name=rootless"]}, {"--user=0:0"}, set()),
        ({"SecurityOptions": ["name=userns"]}, {"--userns=host"}, set()),
        (
            {"MemoryLimit": False, "SwapLimit": False, "CpuCfsQuota": False, "PidsLimit": False},
            set(),
            {"--memory", "--memory-swap", "--cpus", "--pids-limit"},
        ),
        ({"SwapLimit": False}, {"--memory-swap=-1"}, set()),
    ],
)
async def test_what_the_engine_is_like_decides_some_flags(place, info, flags, absent):
    place.double.answer("info", text=info)
    prepared = await place.prepared(place.spec(limits=Limits(cpus=1, ram_bytes=1 << 30)))
    assert flags <= set(prepared.argv)
    assert not {each.partition("=")[0] for each in prepared.argv} & absent
    told = " ".join(str(each) for each in prepared.facts["warnings"])
    assert ("cannot limit memory" in told) is ("--memory" in absent)


async def test_variables_are_in_a_file_and_what_none_can_hold_is_set_inside(place):
    env = {"A": "b c", "PEM": "line\nline", "NVIDIA_VISIBLE_DEVICES": "-1"}
    prepared = await place.prepared(place.spec(env=env))
    (file,) = list(place.root.rglob("container.env"))
    assert file.read_text() == "A=b c\nNVIDIA_VISIBLE_DEVICES=void\n"
    assert file.stat().st_mode & 0o777 == 0o600
    entry, image, *rest = prepared.argv[prepared.argv.index("--entrypoint=python") :]
    assert (entry, image, rest[0]) == ("--entrypoint=python", ID, "-c")
    assert rest[2:] == [str(place.root / "env" / "environment.json"), "python", "main.py"]
    assert not any("line" in each for each in prepared.argv)
    with pytest.raises(errors.UnsupportedRequest, match=r"'PEM' of config.env has a line break"):
        await place.prepared(place.spec(env=env, filename=None))


async def test_an_images_own_program_gets_the_arguments(place):
    prepared = await place.prepared(place.spec(filename=None, args=("a", "-b")))
    assert prepared.argv[-3:] == (ID, "a", "-b")
    assert not any(each.startswith("--entrypoint") for each in prepared.argv)
    assert not place.double.commands("run", "version_info")
    place.double.answer("image", "inspect", text={"Id": ID, "Config": None})
    with pytest.raises(errors.UnsupportedRequest, match="has no program of its own"):
        await place.prepared(place.spec(filename=None))


async def test_the_python_of_the_version_that_is_asked_for(place):
    place.double.answer("run", "--entrypoint=python ", "version_info", text="Python=2.7.18")
    prepared = await place.prepared(place.spec(python="3.11"))
    assert "--entrypoint=python3" in prepared.argv
    assert (await place.prepared(place.spec(python="2"))).facts["python"] == "2.7.18"
    place.double.answer("run", "version_info", text="exec failed", code=127)
    with pytest.raises(errors.UnsupportedRequest, match="has no Python to run"):
        await place.prepared(place.spec())


async def test_requirement_lines_are_a_step_before_the_run(place):
    prepared = await place.prepared(place.spec(requirements=("numpy==1.26", "six"), env={"PATH": "/own"}))
    (installing,) = place.double.commands("run", "--requirement")
    assert installing[installing.index(ID) + 1 :][0] == "-c"
    assert installing[-1] == f"{place.root}/env/requirements.txt"
    assert (place.root / "env" / "requirements.txt").read_text() == "numpy==1.26\nsix\n"
    variables = (place.root / "_runner" / "container.env").read_text().splitlines()
    assert f"PYTHONUSERBASE={place.root}/env" in variables
    assert f"PATH={place.root}/env/bin:/own" in variables
    assert prepared.argv[-1] == "main.py"


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ("Max retries exceeded with url: /simple/six", errors.Unreachable, "package index does not answer"),
        (
            "ERROR: No matching distribution found for six",
            errors.EnvironmentFailed,
            "No matching distribution",
        ),
        ("/usr/bin/python: No module named pip", errors.UnsupportedRequest, "has no pip"),
        # Words of the message's, not of the engine's client.
        ("setup.py: Cannot connect to the Docker daemon", errors.EnvironmentFailed, "exit code 1"),
    ],
)
async def test_requirement_lines_that_cannot_be_installed(place, said, error, match):
    place.double.answer("run", "--requirement", text=said, code=1)
    with pytest.raises(error, match=match):
        await place.prepared(place.spec(requirements=("six",)))


async def test_containers_that_make_a_run_ready_end_with_the_daemon_too(place):
    prepared = await place.prepared(place.spec(requirements=("six",)))
    killed = [argv[1] for argv in place.double.commands("kill")]
    assert (
        killed == names(place)[:-1]
    )  # those of the look for Python, and of pip; the run's is its supervisor's
    assert prepared.cleanup[-1] == names(place)[-1]


async def test_a_python_that_does_not_answer_is_an_attempt_that_failed(place, monkeypatch):
    monkeypatch.setattr(docker_container, "PYTHON_SECS", 0.001)
    with pytest.raises(errors.EnvironmentFailed, match="has not told its version"):
        await place.prepared(place.spec())


async def test_option_lines_arrive_at_pip_as_they_are(place):
    await place.prepared(place.spec(requirements=("--find-links .", "six")))
    first = (place.root / "env" / "requirements.txt").read_text().splitlines()[0]
    assert shlex.split(first) == ["--find-links", str(place.workspace)]  # with a comma and a quote in it


async def test_pins_that_contradict_each_other_are_taken_as_they_stand(place):
    place.double.answer("run", "--requirement", text="ERROR: ResolutionImpossible", code=1)
    place.double.answer("run", "--requirement", "--no-deps")
    prepared = await place.prepared(place.spec(requirements=("a==1", "b==2")))
    assert any("installed as they stand" in str(each) for each in prepared.facts["warnings"])


HOSTILE = [
    "-v /:/host",
    "-v",
    "--privileged",
    "Python:3.11",
    "a b",
    "a\nb",
    "",
    "a:b:c",
    "../x",
    "x/../y",
    "$(id)",
    "x" * 500,
]


@pytest.mark.parametrize("reference", [*HOSTILE, "localhost/studio-runner-loaded:" + "0" * 64])
async def test_what_is_no_name_of_an_image_never_reaches_the_engine(place, reference):
    with pytest.raises(errors.UnsupportedRequest) as refused:
        await place.prepared(place.spec(reference=reference))
    assert not (place.double.directory / "asked").exists()
    assert ("lower case" in str(refused.value)) is (reference == "Python:3.11")


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("docker://python:3.11", "python:3.11"),
        ("dockerhub://tensorflow/tensorflow:1.9.0-gpu", "tensorflow/tensorflow:1.9.0-gpu"),
        ("host.example:5000/a/b@sha256:" + "0a" * 32, "host.example:5000/a/b@sha256:" + "0a" * 32),
    ],
)
async def test_an_image_that_is_missing_is_fetched(place, reference, name):
    place.double.answer("image", "inspect", text="no such image", code=1)
    place.double.answer("pull", text="Pulling fs layer")
    with pytest.raises(errors.EnvironmentFailed, match="was fetched, and is gone"):
        await place.prepared(place.spec(reference=reference))
    assert place.double.commands("pull") == [["pull", name]]
    assert "Pulling fs layer" in place.log.read_text()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (
            "Error response from daemon: manifest for a/b:1 not found: manifest unknown",
            errors.UnsupportedRequest,
        ),
        ("pull access denied for a/b, repository does not exist", errors.UnsupportedRequest),
        ("dial tcp: lookup a.example: no such host", errors.Unreachable),
        ("toomanyrequests: You have reached your pull rate limit", errors.Unreachable),
        ("received unexpected HTTP status: 503 Service Unavailable", errors.Unreachable),
        ("write /var/lib/docker/tmp/x: no space left on device", errors.EnvironmentFailed),
        (
            "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?",
            errors.Unreachable,
        ),
    ],
)
async def test_an_image_that_cannot_be_fetched(place, said, error):
    place.double.answer("image", "inspect", text="no such image", code=1)
    place.double.answer("pull", text=said, code=1)
    with pytest.raises(error):
        await place.prepared(place.spec())


async def test_when_images_are_fetched_is_the_operators_choice(place):
    await place.prepared(place.spec(), place.executor(pull="always"))
    assert place.double.commands("pull") == [["pull", "python:3.11"]]
    place.double.answer("image", "inspect", text="no such image", code=1)
    with pytest.raises(errors.NoEngine, match="--container-pull=never"):
        await place.prepared(place.spec(), place.executor(pull="never"))
    assert len(place.double.commands("pull")) == 1


async def test_what_cannot_be_run_is_refused_without_fetching(place):
    with pytest.raises(errors.UnsupportedRequest, match="is not the name of a container image"):
        await place.executor().vet(Image(engine="docker", reference="-v /:/host"))
    image = Image(engine="docker", reference="python")
    await place.executor(pull="never").vet(image)
    place.double.answer("image", "inspect", text="no such image", code=1)
    await place.executor().vet(image)  # it can be fetched
    with pytest.raises(errors.NoEngine, match="--container-pull=never"):
        await place.executor(pull="never").vet(image)
    file = Image(engine="docker", file=place.tmp_path / "not" / "yet")
    await place.executor(pull="never").vet(file)
    for command in ("image inspect", "version"):
        place.double.answer(command, text="Cannot connect to the Docker daemon", code=1)
    for away in (image, file):
        with pytest.raises(errors.Unreachable):
            await place.executor().vet(away)
    assert place.double.commands("pull") == []
    executors = Executors(venv=Host(), docker=place.executor(engine="off"), singularity=None)
    for engine in ("docker", "singularity"):
        with pytest.raises(errors.NoEngine):
            await executors.vet(Image(engine=engine, reference="python"))


@pytest.mark.parametrize(
    ("state", "ended", "expected"),
    [
        ({"ExitCode": 3}, ProcessExit(code=0), {"code": 3}),
        ({"ExitCode": 0}, ProcessExit(code=1), {"code": 0}),
        ({"ExitCode": 143}, ProcessExit(code=None, signal=9), {"code": 143, "signal": None}),
        ({"ExitCode": 0, "OOMKilled": True}, ProcessExit(code=0), {"code": 0, "oom": ""}),
        (
            {"ExitCode": 137, "OOMKilled": True},
            ProcessExit(code=137),
            {"code": 137, "oom": "the container was at its limit of 2 GB of memory"},
        ),
        (
            {"Status": "created", "ExitCode": 127, "Error": "exec: 'x': not found"},
            ProcessExit(code=127),
            {"code": None, "error": "exec: 'x': not found"},
        ),
    ],
)
async def test_how_a_run_ended_is_what_the_engine_says(place, state, ended, expected, monkeypatch):
    monkeypatch.setattr(docker_module, "_VERDICT_PAUSE_SECS", 0.01)
    place.double.answer("container", "inspect", text=ENDED | state)
    told = await place.verdict(ended, limits=Limits(ram_bytes=2 * 10**9))
    assert {name: getattr(told, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        ({"text": ENDED | {"Status": "running"}}, errors.ProcessLost, "let go of a container"),
        (
            {"text": ENDED | {"Status": "created", "Error": "no nvidia driver"}},
            errors.EnvironmentFailed,
            "no nvidia driver",
        ),
        (
            {
                "text": ENDED
                | {
                    "Status": "created",
                    "Error": 'could not select device driver "" with capabilities: [[gpu]]',
                }
            },
            errors.NoEngine,
            "could not select device driver",
        ),
        ({"text": ENDED | {"ExitCode": 1}}, errors.Unreachable, "went away while the container ran"),
        ({"text": "No such container", "code": 1}, errors.ProcessLost, "is gone"),
        ({"text": "Cannot connect to the Docker daemon", "code": 1}, errors.Unreachable, "does not answer"),
    ],
)
async def test_where_the_engine_cannot_tell(place, answer, error, match, monkeypatch):
    monkeypatch.setattr(docker_module, "VERDICT_SECS", 0.0)
    monkeypatch.setattr(docker_module, "_VERDICT_PAUSE_SECS", 0.01)
    place.double.answer("container", "inspect", **answer)
    with pytest.raises(error, match=match):
        await place.verdict(ProcessExit(code=125 if "went away" in match else 1))


async def test_an_engine_that_ends_its_containers_before_itself(place, monkeypatch):
    monkeypatch.setattr(docker_module, "_VERDICT_PAUSE_SECS", 0.01)
    place.double.answer("container", "inspect", text=ENDED | {"ExitCode": 143})
    place.double.answer("version", text="Cannot connect to the Docker daemon", code=1)
    with pytest.raises(errors.Unreachable, match="was stopped, and its containers with it"):
        await place.verdict(ProcessExit(code=143))


async def test_the_containers_process_is_believed_only_when_it_is_the_runs(place):
    env = {"STUDIOML_HOME": str(place.root)}
    ours = await asyncio.create_subprocess_exec("sleep", "600", env=env | os.environ)
    other = await asyncio.create_subprocess_exec("sleep", "600", env=os.environ | {"STUDIOML_HOME": "/x"})
    prepared = await place.prepared(place.spec(env=env))
    assert prepared.first is not None
    try:
        # Each has become what it is to be: environments are those of before until then.
        for process, home in ((ours, str(place.root)), (other, "/x")):
            while probe.environment(process.pid).get("STUDIOML_HOME") != home:
                await asyncio.sleep(0.01)
        name = prepared.cleanup[-1]
        for said, found in (
            (f"WARNING: something else\n{ours.pid}", usage.first(ours.pid)),
            (str(other.pid), None),
            ("0", None),  # it does not run
            ("1", None),
            ("4" * 10, None),
            ("<no value>", None),
        ):
            place.double.answer("container inspect", "State.Pid", name, text=said)
            assert await prepared.first() == found
    finally:
        for process in (ours, other):
            process.kill()
            await process.wait()
    place.double.answer("container inspect", text="no such container", code=1)
    assert await prepared.first() is None
    place.double.answer("container inspect", text="Cannot connect to the Docker daemon", code=1)
    assert await prepared.first() is None
    nameless = await place.prepared(place.spec())
    assert nameless.first is not None
    assert await nameless.first() is None


async def test_reaping_asks_nothing_where_nothing_ever_ran(place):
    await place.executor().reap()
    assert not (place.double.directory / "asked").exists()


async def test_reaping_survives_an_engine_that_is_away_and_removes_ours_alone(place, monkeypatch):
    monkeypatch.setattr(docker_module, "REAP_PAUSE_SECS", 0.01)
    (place.state_dir / "containers").write_text("me")
    place.double.answer("ps", text="Cannot connect to the Docker daemon", code=1)
    executor = place.executor()
    reaping = asyncio.create_task(executor.reap())
    async with asyncio.timeout(60):
        while not (place.double.directory / "asked").exists():
            await asyncio.sleep(0.01)
        place.double.answer("ps", text="WARNING: x\nstudio-runner-a.0-run-1\n")
        await reaping
    assert place.double.commands("ps")[-1] == [
        "ps", "--all", "--filter", "label=studio-runner.owner=me", "--format", "{{.Names}}",
    ]  # fmt: skip
    assert [each[-1] for each in place.double.commands("rm")] == ["studio-runner-a.0-run-1"]


async def test_what_could_not_be_removed_is_swept_before_the_next_run(place):
    executor = place.executor()
    place.double.answer("rm", "run", text="Cannot connect to the Docker daemon", code=1)
    first = (await place.prepared(place.spec(), executor)).cleanup[-1]
    place.double.answer("rm")
    place.double.answer("ps", text=first)
    await place.prepared(place.spec(), executor)
    assert names(place).count(first) == 2
    await place.prepared(place.spec(), executor)
    assert names(place).count(first) == 2


# -- the choice


class Chosen(Exception):  # noqa: N818
    pass


class Host(Executor):
    def prepare(self, spec: RunSpec, log: Any) -> Any:
        raise Chosen


async def test_each_run_goes_to_the_executor_of_its_image(place):
    executors = Executors(venv=Host(), docker=place.executor(), singularity=None)
    async with executors.prepare(place.spec(), place.log) as prepared:
        assert prepared.argv[0] == str(place.double.program)
    on_the_host = RunSpec(run_dir=place.root, workspace=place.workspace, filename="main.py")
    with pytest.raises(Chosen):
        async with executors.prepare(on_the_host, place.log):
            pass


@pytest.mark.parametrize(
    ("engine", "path", "match"),
    [
        ("off", None, "--container-engine=off"),
        ("auto", "/nowhere", "install one, or name it with --container-engine"),
        ("/no/such/engine", None, "--container-engine=/no/such/engine is no program here"),
    ],
)
def test_a_container_without_an_engine_is_for_another_host(place, engine, path, match):
    own = {"PATH": path or str(place.double.directory)}
    docker = DockerExecutor(config.Containers(engine=engine), place.state_dir, place.spawner, environ=own)
    executors = Executors(venv=Host(), docker=docker, singularity=None)
    executors.check(None)
    with pytest.raises(errors.NoEngine, match=match):
        executors.check("docker")
    with pytest.raises(errors.NoEngine, match="no such engine is enabled on this host"):
        executors.check("singularity")
    assert issubclass(errors.NoEngine, errors.NotForThisHost)
