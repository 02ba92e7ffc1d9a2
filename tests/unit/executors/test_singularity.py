"""The command lines of the Singularity executor, on an engine that records them and runs the program on the host.

The double, not a real engine: tests/service/test_singularity.py has that where it can be had.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from runner import errors
from runner.config import Images
from runner.executors import kernelfiles
from runner.executors.base import Image, Limits, RunSpec
from runner.executors.singularity import SingularityExecutor
from runner.process.base import Command
from runner.process.spawner import Spawner

DOUBLE = f"""#!{sys.executable}
import json, os, sys, time
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls"), "a") as calls:
    calls.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
words = sys.argv[1:]
if words == ["--version"]:
    print("apptainer version 0-double")
elif words[0] == "pull":
    if os.environ.get("APPTAINER_SAYS"):
        sys.exit(os.environ["APPTAINER_SAYS"])
    open(words[-2], "wb").write(b" " * 32 + b"SIF_MAGIC\\0" + b" " * int(os.environ.get("APPTAINER_BYTES", "10")))
else:
    os.chdir(words[words.index("--pwd") + 1])
    program = words[words.index("/bin/sh"):]
    os.execvpe("/bin/sh", program, {{"PATH": os.environ["PATH"]}})
"""
REFERENCE = "dockerhub://tensorflow/tensorflow:1.4.0"


@pytest.fixture
async def spawner():
    spawner = Spawner()
    yield spawner
    await spawner.aclose()


class Bench:
    def __init__(self, root: Path, spawner: Spawner) -> None:
        self.root = root
        self.spawner = spawner
        self.bin = root / "bin"
        self.bin.mkdir()
        self.environ = {"PATH": f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(root)}

    def install(self, name: str = "apptainer") -> None:
        (self.bin / name).write_text(DOUBLE)
        (self.bin / name).chmod(0o755)

    def executor(self, allowed: tuple[str, ...] = ("dockerhub://tensorflow/", "artifact:"), **more: str):
        config = Images(cache_dir=self.root / "cache", allowed=allowed)
        return SingularityExecutor(config, self.spawner, environ=self.environ | more)

    def spec(self, image: Image, *, name: str = "run", filename: str | None = "main.py", **more) -> RunSpec:
        run_dir = self.root / name
        workspace = run_dir / "experiments" / "x" / "workspace"
        workspace.mkdir(parents=True)
        (workspace / "main.py").write_text("import os, sys; print(sys.argv[1:], os.environ['SECRET'])")
        env = {"SECRET": "canary-1"}
        return RunSpec(run_dir=run_dir, workspace=workspace, filename=filename, image=image, env=env, **more)

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        calls = self.bin / "calls"
        return [tuple(json.loads(line)) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.fixture
def bench(tmp_path, spawner):
    return Bench(tmp_path, spawner)


def by_reference(reference: str = REFERENCE) -> Image:
    return Image(engine="singularity", reference=reference)


async def test_the_command_lines(bench):
    bench.install()
    spec = bench.spec(by_reference(), args=("a b", "$(id)"), limits=Limits(gpus=("GPU-1",)))
    log = spec.run_dir / "_runner" / "log"
    log.parent.mkdir()
    executor = bench.executor(APPTAINER_DOCKER_PASSWORD="canary-2", APPTAINER_BIND="/etc", HTTPS_PROXY="p")
    async with executor.prepare(spec, log) as prepared:
        image = prepared.argv[prepared.argv.index("/bin/sh") - 1]
        container = spec.run_dir / "container"
        assert prepared.argv == (
            *(
                str(bench.bin / "apptainer"),
                "--silent",
                "exec",
                "--containall",
                "--cleanenv",
                "--no-home",
                "--no-privs",
            ),
            *("--nv", *kernelfiles.binds(container / "empty")),
            *("--workdir", str(container / "work")),
            *(
                "--bind",
                f"{spec.run_dir},{container / 'empty'}:{log.parent}:ro",
                "--pwd",
                str(spec.workspace),
            ),
            *(image, "/bin/sh", str(container / "program.sh")),
            *("python", "main.py", "a b", "$(id)"),
        )
        assert Path(image).parent == bench.root / "cache" / "images"
        assert prepared.env["APPTAINER_TMPDIR"] == prepared.env["SINGULARITY_TMPDIR"] == str(container)
        assert not {"APPTAINER_DOCKER_PASSWORD", "APPTAINER_BIND", "SECRET"} & set(prepared.env)
        assert prepared.facts["image"] == REFERENCE
        assert prepared.facts["engine"] == "apptainer version 0-double"
        output = bench.root / "output"
        ended = await bench.spawner.run(
            Command(argv=prepared.argv, env=prepared.env, cwd=spec.workspace, output=output), timeout_secs=60
        )
        assert prepared.verdict is not None
        assert (await prepared.verdict(ended)).ok
        assert output.read_text() == "['a b', '$(id)'] canary-1\n"
    pull, environ = bench.calls()[0]
    assert pull[:3] == ["pull", "--disable-cache", "--force"]
    assert pull[4:] == ["docker://docker.io/tensorflow/tensorflow:1.4.0"]
    assert environ["APPTAINER_DOCKER_PASSWORD"] == "canary-2"
    assert environ["HTTPS_PROXY"] == "p"
    assert environ["APPTAINER_TMPDIR"] == str(Path(pull[3]).parent)


async def test_without_cards_no_driver_is_asked_for(bench):
    bench.install("singularity")
    async with bench.executor().prepare(bench.spec(by_reference()), bench.root / "log") as prepared:
        assert "--nv" not in prepared.argv
        assert prepared.argv[0] == str(bench.bin / "singularity")


async def test_an_untrusted_image_is_refused_before_anything_runs(bench):
    bench.install()
    with pytest.raises(errors.UnsupportedRequest, match="untrusted image specified"):
        async with bench.executor().prepare(bench.spec(by_reference("docker://evil/x")), bench.root / "log"):
            pass
    with pytest.raises(errors.UnsupportedRequest, match="untrusted image specified"):
        await bench.executor().vet(by_reference("docker://evil/x"))
    await bench.executor().vet(by_reference())
    assert bench.calls() == []


async def test_image_files_are_refused_where_the_operator_does_not_list_them(bench, tmp_path):
    bench.install()
    image = Image(engine="singularity", file=tmp_path / "x.sif")
    (tmp_path / "x.sif").write_bytes(b" " * 32 + b"SIF_MAGIC\0")
    async with bench.executor().prepare(bench.spec(image), bench.root / "log") as prepared:
        assert str(tmp_path / "x.sif") in prepared.argv
    with pytest.raises(errors.UnsupportedRequest, match="untrusted image specified"):
        async with bench.executor(("docker://*",)).prepare(bench.spec(image, name="two"), bench.root / "log"):
            pass
    (tmp_path / "x.sif").unlink()  # only its name counts before it is fetched
    await bench.executor().vet(image)
    with pytest.raises(errors.UnsupportedRequest, match=r"untrusted image specified: 'x\.sif'"):
        await bench.executor(("docker://*",)).vet(image)


async def test_a_host_without_an_engine_leaves_the_message_to_others(bench):
    with pytest.raises(errors.NotForThisHost, match="no apptainer or singularity"):
        await bench.executor().vet(by_reference())
    with pytest.raises(errors.NotForThisHost, match="no apptainer or singularity"):
        async with bench.executor().prepare(bench.spec(by_reference()), bench.root / "log"):
            pass


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (
            "FATAL: pinging container registry x: dial tcp 1.2.3.4:443: connect: connection refused",
            errors.Unreachable,
        ),
        ("FATAL: dial tcp: lookup x on 1.1.1.1:53: no such host", errors.Unreachable),
        ("FATAL: received unexpected HTTP status: 503 Service Unavailable", errors.Unreachable),
        ("FATAL: toomanyrequests: You have reached your pull rate limit", errors.Unreachable),
        ("FATAL: no response received from singularity hub", errors.Unreachable),
        ("FATAL: reading manifest 1 in x/y: manifest unknown", errors.UnsupportedRequest),
        ("FATAL: errors: denied: requested access to the resource is denied", errors.EnvironmentFailed),
        ('FATAL: exec: "mksquashfs": executable file not found in $PATH', errors.EnvironmentFailed),
        ("FATAL: the requested manifest was not found in singularity hub", errors.UnsupportedRequest),
        ("FATAL: while running mksquashfs: no space left on device", errors.EnvironmentFailed),
        ("", errors.EnvironmentFailed),
    ],
)
async def test_what_a_failed_fetch_means(bench, says, error):
    bench.install()
    if not says:  # it says that it was well, and there is no image
        (bench.bin / "apptainer").write_text("#!/bin/sh\n")
    with pytest.raises(error, match=re.escape(says) or "cannot be made") as caught:
        async with bench.executor(APPTAINER_SAYS=says).prepare(
            bench.spec(by_reference()), bench.root / "log"
        ):
            pass
    if error is errors.Unreachable:
        assert caught.value.endpoint == "docker.io"
    assert not list((bench.root / "cache" / "images").iterdir())
    assert says in (bench.root / "log").read_text()


async def test_those_who_want_the_same_share_one_fetch_and_its_failure(bench):
    bench.install()
    executor = bench.executor(APPTAINER_SAYS="FATAL: something")

    async def want(n: int) -> str:
        try:
            async with executor.prepare(bench.spec(by_reference(), name=f"run{n}"), bench.root / "log"):
                return "made"
        except errors.EnvironmentFailed:
            return "failed"

    assert await asyncio.gather(*map(want, range(5))) == ["failed"] * 5
    assert len(bench.calls()) == 1


async def test_a_working_directory_that_the_engine_would_take_apart_is_refused(bench):
    bench.install()
    with pytest.raises(errors.UsageError, match="--working-dir"):
        async with bench.executor().prepare(bench.spec(by_reference(), name="a:b"), bench.root / "log"):
            pass
