"""Programs in real Singularity images, by a real Apptainer where this machine lets one run (tests/servers/apptainer.py)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys

import psutil
import pytest

from runner import errors
from runner.config import Images
from runner.executors.base import Image, Limits, RunSpec
from runner.executors.singularity import SingularityExecutor
from runner.process.base import Command
from runner.process.spawner import Spawner
from tests.servers import apptainer as engine_server
from tests.servers.oci_registry import OciRegistry
from tests.service.test_venv import make_wheel

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

GENEROUS_SECS = 120
HOSTILE = "a'b\"c\n$(touch /tmp/evaluated) `id` \\ ${HOME} \t*é\n"


@pytest.fixture(scope="session")
def images(apptainer, tmp_path_factory):
    """Files: a shell with a runscript, and a Python with its pip."""
    folder = tmp_path_factory.mktemp("images")
    shell = engine_server.busybox_root(folder / "shell")
    description = shell / ".singularity.d"
    description.mkdir()
    runscript = description / "runscript"
    runscript.write_text('#!/bin/sh\nprintf "<%s>" runscript "$@"\nprintf "%s" "$WORD"\nexit 5\n')
    runscript.chmod(0o755)
    python = engine_server.python_root(folder / "python")
    return {
        "shell": apptainer.build(folder / "shell.sif", shell, folder),
        "python": apptainer.build(folder / "python.sif", python, folder),
    }


@pytest.fixture
async def spawner():
    spawner = Spawner()
    yield spawner
    await spawner.aclose()


@dataclasses.dataclass
class Bench:
    """What one test runs with."""

    root: pathlib.Path
    spawner: Spawner
    environ: dict[str, str]
    allowed: tuple[str, ...] = ("artifact:",)
    cache_bytes: int = 10_000_000_000
    runs: int = 0

    def executor(self, **more: str) -> SingularityExecutor:
        config = Images(cache_dir=self.root / "cache", cache_bytes=self.cache_bytes, allowed=self.allowed)
        return SingularityExecutor(config, self.spawner, environ=self.environ | more)

    def spec(self, image, filename="main.py", script="", **more) -> RunSpec:
        self.runs += 1
        run_dir = self.root / f"run {self.runs}"
        workspace = run_dir / "experiments" / "x" / "workspace"
        workspace.mkdir(parents=True)
        (run_dir / "tmp").mkdir()
        (run_dir / "_runner").mkdir()
        if filename is not None and script:
            (workspace / filename).write_text(script)
        env = {"HOME": str(run_dir), "TMPDIR": str(run_dir / "tmp"), **more.pop("env", {})}
        chosen = (
            Image(engine="singularity", reference=image)
            if isinstance(image, str)
            else Image(engine="singularity", file=image)
        )
        return RunSpec(run_dir=run_dir, workspace=workspace, filename=filename, env=env, image=chosen, **more)

    def log(self, spec: RunSpec) -> pathlib.Path:
        return spec.run_dir / "_runner" / "builder.log"

    async def run(self, spec: RunSpec, executor: SingularityExecutor | None = None):
        """How it ended, and what it printed."""
        async with (executor or self.executor()).prepare(spec, self.log(spec)) as prepared:
            output = spec.run_dir / "output"
            ended = await self.spawner.run(
                Command(argv=prepared.argv, env=prepared.env, cwd=spec.workspace, output=output),
                timeout_secs=GENEROUS_SECS,
            )
            assert prepared.verdict is not None
            try:
                return await prepared.verdict(ended), output.read_bytes().decode()
            except errors.EnvironmentFailed:
                print(output.read_text())
                raise


@pytest.fixture
def bench(apptainer, tmp_path, spawner):
    (tmp_path / "home").mkdir()
    return Bench(tmp_path, spawner, apptainer.environ(tmp_path / "home"))


async def until(condition) -> None:
    async with asyncio.timeout(GENEROUS_SECS):
        while not condition():
            await asyncio.sleep(0.02)


# -- what a program finds


async def test_a_program_finds_its_layout_its_variables_and_nothing_else(bench, images, tmp_path):
    (tmp_path / "secret").write_text("of the host")
    script = f"""
import json, os, sys
json.dump({{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "host": os.path.exists({str(tmp_path / "secret")!r}),
            "pids": [each for each in os.listdir("/proc") if each.isdigit()], "root": os.access("/opt", os.W_OK)}}, sys.stdout)
open("../made", "w").write("x"); open("/tmp/scratch", "w").write("y" * 1000)
print(flush=True)
print("on stderr", file=sys.stderr)
"""
    spec = bench.spec(
        images["python"],
        script=script,
        args=("--a", "two words", "$(touch /tmp/evaluated)", "'"),
        env={"HOSTILE": HOSTILE, "EMPTY": "", "CUDA_VISIBLE_DEVICES": "-1", "no-identifier": "x", "UID": "7"},
    )
    executor = bench.executor(
        AWS_SECRET_ACCESS_KEY="canary", APPTAINERENV_LEAK="canary", SINGULARITYENV_LEAK="canary"
    )
    async with executor.prepare(spec, bench.log(spec)) as prepared:
        assert "evaluated" in " ".join(prepared.argv)
        assert not any("CUDA" in word or "a'b" in word for word in prepared.argv), (
            "values show in the argument list"
        )
        assert "canary" not in prepared.env.values()
        assert prepared.facts["engine"].startswith("apptainer")
        assert prepared.facts["warnings"] == [
            "the variable 'no-identifier' cannot be set in a container",
            "the variable 'UID' cannot be set in a container",
        ]
    shutil.rmtree(spec.run_dir / "container")
    ended, printed = await bench.run(spec, executor)
    assert ended.ok, printed
    first, rest = printed.split("\n", 1)
    seen = json.loads(first)
    assert rest == "on stderr\n", "the engine's own words are in the output"
    assert seen["argv"] == list(spec.args)
    assert seen["cwd"] == str(spec.workspace)
    assert {name: seen["env"][name] for name in spec.env if name.isidentifier() and name != "UID"} == {
        name: value for name, value in spec.env.items() if name.isidentifier() and name != "UID"
    }
    assert "canary" not in seen["env"].values()
    assert seen["env"]["PATH"].endswith("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    assert not seen["host"]
    assert not seen["root"]
    assert len(seen["pids"]) <= 3, "it sees processes of the host"
    assert not pathlib.Path("/tmp/evaluated").exists()
    assert (spec.workspace.parent / "made").read_text() == "x"
    assert sum(file.stat().st_size for file in spec.run_dir.rglob("scratch")) == 1000, "/tmp is not the run's"


async def test_what_is_the_daemon_s_in_the_run_s_directory_is_out_of_reach(bench, images):
    script = """
import os
os.chdir("../../..")
print(os.listdir("_runner"))
for what, *paths in ((os.mkdir, "_runner/made"), (os.rename, "_runner", "moved")):
    try:
        what(*paths)
        print("done:", *paths)
    except OSError:
        pass
"""
    spec = bench.spec(images["python"], script=script)
    (spec.run_dir / "_runner" / "request.json").write_text("the message")
    ended, printed = await bench.run(spec)
    assert ended.ok, printed
    assert printed == "[]\n"


async def test_root_in_a_container_cannot_write_the_kernel_s_settings(bench, images):
    script = """
import os, stat
def writable(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True
for top in ("/proc/sys", "/proc/irq", "/proc/bus", "/sys"):
    for folder, _, files in os.walk(top):
        for name in files:
            if os.lstat(folder + "/" + name).st_mode & 0o222 and writable(folder + "/" + name):
                print(folder + "/" + name)
trigger = "/proc/sysrq-trigger"
print(open("/proc/sys/kernel/ostype").read().strip(), os.path.exists(trigger) and not stat.S_ISCHR(os.stat(trigger).st_mode))
"""
    ended, printed = await bench.run(bench.spec(images["python"], script=script))
    assert ended.ok, printed
    assert printed == "Linux False\n", "settings of the host can be changed"


async def test_without_a_file_name_the_image_s_own_program_runs(bench, images):
    spec = bench.spec(images["shell"], filename=None, args=("two words", "$(id)"), env={"WORD": HOSTILE})
    ended, printed = await bench.run(spec)
    assert (ended.code, printed) == (5, f"<runscript><two words><$(id)>{HOSTILE}")


async def test_modules_run_too(bench, images):
    spec = bench.spec(images["python"], filename="-m", args=("platform",))
    ended, printed = await bench.run(spec)
    assert ended.ok
    assert "Linux" in printed


async def test_granted_cards_are_asked_of_the_engine(bench, images):
    spec = bench.spec(
        images["python"],
        script="import os; print(os.environ['CUDA_VISIBLE_DEVICES'])",
        limits=Limits(gpus=("GPU-1", "GPU-2")),
        env={"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"},
    )
    async with bench.executor().prepare(spec, bench.log(spec)) as prepared:
        assert "--nv" in prepared.argv
    shutil.rmtree(spec.run_dir / "container")
    ended, printed = await bench.run(spec)
    assert ended.ok
    assert printed.splitlines()[-1] == "GPU-1,GPU-2"


async def test_a_signal_that_a_program_dies_of_is_told(bench, images):
    spec = bench.spec(images["python"], script="import os; os.abort()")
    ended, printed = await bench.run(spec)
    assert (ended.code, ended.signal) == (None, signal.SIGABRT)
    assert printed == "", "the shell speaks of it"


async def test_an_image_without_python_is_said_to_have_none(bench, images):
    with pytest.raises(errors.UnsupportedRequest, match="no Python"):
        await bench.run(bench.spec(images["shell"], script="1"))


async def test_what_is_no_image_is_refused_and_what_cannot_start_is_the_environment_s_failure(
    bench, images, tmp_path
):
    (tmp_path / "text.sif").write_text("no image")
    with pytest.raises(errors.UnsupportedRequest, match="no SIF"):
        await bench.run(bench.spec(tmp_path / "text.sif", script="1"))
    cut = tmp_path / "cut.sif"
    cut.write_bytes(images["python"].read_bytes()[:40_000])
    with pytest.raises(errors.EnvironmentFailed, match="could not start the container"):
        await bench.run(bench.spec(cut, script="1"))


# -- how it is ended


def family(process) -> list[psutil.Process]:
    return psutil.Process(process.supervisor_pid).children(recursive=True)


STUBBORN = """
import os, signal, subprocess, sys, time
def told(*_):
    print("TERM", flush=True)
signal.signal(signal.SIGTERM, told)
child = subprocess.Popen([sys.executable, "-c", "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); print('child', flush=True); time.sleep(600)"])
print("ready", flush=True)
while True:
    time.sleep(60)
"""


async def test_the_kill_ladder_reaches_the_program_and_leaves_nothing(bench, images):
    spec = bench.spec(images["python"], script=STUBBORN)
    async with bench.executor().prepare(spec, bench.log(spec)) as prepared:
        output = spec.run_dir / "output"
        process = await bench.spawner.start(
            Command(argv=prepared.argv, env=prepared.env, cwd=spec.workspace, output=output)
        )
        await until(lambda: "child" in output.read_text() and "ready" in output.read_text())
        everybody = family(process)
        assert len(everybody) >= 3
        stopping = asyncio.create_task(process.stop(60))
        await until(lambda: "TERM" in output.read_text())
        ended = await process.stop(0)
        await stopping
        assert ended.stopped
        _, alive = psutil.wait_procs(everybody, timeout=0)
        assert not alive
    assert str(spec.run_dir) not in pathlib.Path("/proc/mounts").read_text()


GRACEFUL = """
import signal, time
times = []
signal.signal(signal.SIGTERM, lambda *_: times.append(time.monotonic()))
print("ready", flush=True)
while not times or time.monotonic() - times[0] < 1:
    time.sleep(0.05)
print(len(times), flush=True)
raise SystemExit(3)
"""


async def test_a_program_gets_one_term_and_may_end_by_itself(bench, images):
    """The engine's processes get it too, and pass it on."""
    spec = bench.spec(images["python"], script=GRACEFUL)
    async with bench.executor().prepare(spec, bench.log(spec)) as prepared:
        output = spec.run_dir / "output"
        process = await bench.spawner.start(
            Command(argv=prepared.argv, env=prepared.env, cwd=spec.workspace, output=output)
        )
        await until(lambda: "ready" in output.read_text())
        ended = await process.stop(GENEROUS_SECS)
    assert (ended.code, output.read_text()) == (3, "ready\n1\n")


async def test_nothing_is_left_when_the_daemon_and_the_engine_are_killed(bench, images, apptainer):
    spec = bench.spec(images["python"], script=STUBBORN)
    async with bench.executor().prepare(spec, bench.log(spec)) as prepared:
        output = spec.run_dir / "output"
        process = await bench.spawner.start(
            Command(argv=prepared.argv, env=prepared.env, cwd=spec.workspace, output=output)
        )
        await until(lambda: "child" in output.read_text() and "ready" in output.read_text())
        everybody = family(process)
        os.kill(process.pid, signal.SIGKILL)  # the engine's own parent of the container
        ended = await process.wait()
        assert ended.signal == signal.SIGKILL
        _, alive = psutil.wait_procs(everybody, timeout=0)
        assert not alive


# -- packages


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder, "apple", "1.0")
    make_wheel(folder, "pear", "1.0", requires=("apple<2",))
    return folder


def placed(spec: RunSpec, wheels: pathlib.Path) -> RunSpec:
    """Wheels in the workspace: what a message can name without an index."""
    for wheel in wheels.iterdir():
        shutil.copy2(wheel, spec.workspace)
    return spec


async def test_packages_go_into_a_place_of_the_run_s_own(bench, images, wheels):
    script = "import apple, pear, subprocess; print(apple.VERSION, apple.__file__, flush=True); subprocess.run(['pear-say'], check=True)"
    wanted = {"requirements": ("--find-links .", "--no-index", "pear==1.0"), "env": {"PIP_NO_INDEX": "1"}}
    spec = placed(bench.spec(images["python"], script=script, **wanted), wheels)
    ended, printed = await bench.run(spec)
    assert ended.ok, printed
    assert printed.startswith(f"1.0 {spec.run_dir}/env/")
    assert "pear 1.0" in printed
    assert "Successfully installed" in bench.log(spec).read_text()
    other = bench.spec(images["python"], script="import apple")
    ended, printed = await bench.run(other)
    assert "ModuleNotFoundError" in printed, "another run sees it too"


async def test_a_python_without_user_packages_gets_them_all_the_same(bench, images, wheels):
    """As in images whose Python is a virtual environment."""
    wanted = {
        "requirements": ("--find-links .", "pear==1.0"),
        "env": {"PIP_NO_INDEX": "1", "PYTHONNOUSERSITE": "1"},
    }
    spec = placed(bench.spec(images["python"], script="import pear; print(pear.__file__)", **wanted), wheels)
    ended, printed = await bench.run(spec)
    assert ended.ok, printed
    assert printed.startswith(f"{spec.run_dir}/env/site/")


async def test_packages_that_cannot_be_had_say_why(bench, images):
    spec = bench.spec(
        images["python"], script="1", requirements=("nosuchthing==1.0",), env={"PIP_NO_INDEX": "1"}
    )
    with pytest.raises(errors.EnvironmentFailed, match=r"(?s)pip: exit code 1.*nosuchthing"):
        await bench.run(spec)


async def test_an_index_that_does_not_answer_is_unreachable(bench, images):
    env = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    spec = bench.spec(images["python"], script="1", requirements=("nosuchthing==1.0",), env=env)
    with pytest.raises(errors.Unreachable):
        await bench.run(spec)


async def test_an_image_without_pip_is_said_to_have_none(bench, apptainer, tmp_path):
    root = engine_server.python_root(tmp_path / "root", pip=False)
    image = apptainer.build(tmp_path / "nopip.sif", root, tmp_path / "home")
    with pytest.raises(errors.UnsupportedRequest, match="no pip"):
        await bench.run(bench.spec(image, script="1", requirements=("apple==1.0",)))


# -- images from servers


@pytest.fixture
def registry(bench, tmp_path):
    with OciRegistry() as registry:
        bench.allowed = (f"docker://127.0.0.1:{registry.port}/fruit/",)
        bench.environ["APPTAINER_NOHTTPS"] = "true"
        yield registry


@pytest.fixture
def pushed(registry, tmp_path) -> str:
    root = engine_server.busybox_root(tmp_path / "registry root")
    registry.push("fruit/apple", "1", root, ["/bin/printf", "<%s>"])
    return f"docker://127.0.0.1:{registry.port}/fruit/apple:1"


async def test_an_image_is_fetched_once_for_all_and_kept(bench, registry, pushed):
    executor = bench.executor()
    specs = [bench.spec(pushed, filename=None, args=(f"{n} $(id)",)) for n in range(3)]
    results = await asyncio.gather(*(bench.run(spec, executor) for spec in specs))
    assert [printed for _, printed in results] == [f"<{n} $(id)>" for n in range(3)], results
    other = bench.executor()  # another daemon's
    await bench.run(bench.spec(pushed, filename=None, args=("x",)), other)
    pulls = registry.pulls
    await bench.run(bench.spec(pushed, filename=None, args=("x",)), other)
    assert registry.pulls == pulls
    assert len(list((bench.root / "cache" / "images").iterdir())) == 1
    assert not list((bench.root / "home").rglob("*.sif"))


async def test_a_digest_is_kept_for_ever_and_a_tag_for_a_day(bench, registry, tmp_path):
    root = engine_server.busybox_root(tmp_path / "root")
    pinned = registry.push("fruit/apple", "1", root, ["/bin/printf", "%s"])
    tagged = f"docker://127.0.0.1:{registry.port}/fruit/apple:1"
    executor = bench.executor()
    for reference in (pinned, tagged):
        await bench.run(bench.spec(reference, filename=None, args=("x",)), executor)
    for image in (bench.root / "cache" / "images").glob("*.sif"):
        key, _, fetched = image.stem.rpartition("-")
        image.rename(image.with_name(f"{key}-{int(fetched, 16) - 90_000:x}.sif"))
    before = registry.pulls
    await bench.run(bench.spec(pinned, filename=None, args=("x",)), executor)
    assert registry.pulls == before
    await bench.run(bench.spec(tagged, filename=None, args=("x",)), executor)
    assert registry.pulls > before


async def test_an_old_image_serves_while_its_server_does_not_answer(bench, registry, pushed):
    executor = bench.executor()
    await bench.run(bench.spec(pushed, filename=None, args=("x",)), executor)
    [image] = (bench.root / "cache" / "images").glob("*.sif")
    key, _, fetched = image.stem.rpartition("-")
    image.rename(image.with_name(f"{key}-{int(fetched, 16) - 90_000:x}.sif"))
    registry.status = 503
    spec = bench.spec(pushed, filename=None, args=("x",))
    async with executor.prepare(spec, bench.log(spec)) as prepared:
        [warning] = prepared.facts["warnings"]
        assert "an old image" in warning


@pytest.mark.parametrize("how", ["closed", "busy"])
async def test_a_server_that_does_not_answer_is_unreachable(bench, registry, pushed, how):
    if how == "closed":
        registry.__exit__()
    else:
        registry.status = 503
    spec = bench.spec(pushed, filename=None)
    with pytest.raises(errors.Unreachable) as caught:
        await bench.run(spec)
    assert caught.value.endpoint == f"127.0.0.1:{registry.port}"
    assert bench.log(spec).read_text(), "what the builder printed is lost"


async def test_an_image_that_is_not_there_is_final(bench, registry, pushed):
    with pytest.raises(errors.UnsupportedRequest, match="there is no image"):
        await bench.run(bench.spec(pushed.replace("apple:1", "pear:1"), filename=None))


async def test_a_fetch_that_is_cancelled_ends_and_leaves_nothing(bench, registry, pushed):
    registry.hold.clear()
    executor = bench.executor()
    task = asyncio.create_task(bench.run(bench.spec(pushed, filename=None), executor))
    await until(registry.held.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((bench.root / "cache" / "images").iterdir())
    registry.hold.set()
    _, printed = await bench.run(bench.spec(pushed, filename=None, args=("x",)), executor)
    assert printed == "<x>"


DAEMON = """
import asyncio, pathlib, sys
sys.path.insert(0, sys.argv[4])
from runner.config import Images
from runner.executors.singularity import SingularityExecutor
from runner.executors import imageref
from runner.process.spawner import Spawner
async def main():
    spawner = Spawner()
    root = pathlib.Path(sys.argv[1])
    executor = SingularityExecutor(Images(cache_dir=root / "cache", allowed=(sys.argv[3],)), spawner)
    async with executor.cache.lease(imageref.parse(sys.argv[2]), root / "log"):
        pass
asyncio.run(main())
"""


async def test_what_a_killed_daemon_had_fetched_half_is_never_used_and_is_swept(bench, registry, pushed):
    registry.hold.clear()
    root = str(pathlib.Path(__file__).resolve().parents[2])
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DAEMON, str(bench.root), pushed, bench.allowed[0], root), env=bench.environ
    )
    images = bench.root / "cache" / "images"
    try:
        await until(registry.held.is_set)
        assert list(images.glob(".new-*"))
        await bench.executor().reap()
        assert list(images.glob(".new-*")), "what is being fetched was removed"
    finally:
        daemon.kill()
        await daemon.wait()
    registry.hold.set()
    assert list(images.glob(".new-*"))
    async with asyncio.timeout(GENEROUS_SECS):  # the fetching engine has some seconds to end
        while list(images.glob(".new-*")):
            await bench.executor().reap()
    _, printed = await bench.run(bench.spec(pushed, filename=None, args=("x",)))
    assert printed == "<x>"


async def test_the_quota_takes_what_was_used_longest_ago_and_nothing_in_use(bench, registry, tmp_path):
    root = engine_server.busybox_root(tmp_path / "root")
    for name in ("fruit/apple", "fruit/pear", "fruit/plum"):
        registry.push(name, "1", root, ["/bin/printf", name])
    references = [f"docker://127.0.0.1:{registry.port}/fruit/{name}:1" for name in ("apple", "pear", "plum")]
    executor = bench.executor()
    executor.cache._quota_bytes = 1
    images = bench.root / "cache" / "images"
    async with contextlib.AsyncExitStack() as stack:
        for reference in references[:2]:
            spec = bench.spec(reference, filename=None)
            await stack.enter_async_context(executor.prepare(spec, bench.log(spec)))
        await executor.cache.evict()
        assert len(list(images.glob("*.sif"))) == 2, "images in use were evicted"
    await executor.cache.evict()
    assert not list(images.glob("*.sif"))
    ended, _ = await bench.run(bench.spec(references[2], filename=None), executor)
    assert ended.ok
