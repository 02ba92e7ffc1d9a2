"""Real environments by the real uv, from wheels made here; no network but where a test says so."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import psutil
import pytest

from runner import errors
from runner.config import Environments
from runner.executors.base import RunSpec
from runner.executors.venv import VenvExecutor
from runner.process.spawner import Spawner

pytestmark = pytest.mark.service

CAPTURED = Path(__file__).parents[1] / "data" / "captured"
GENEROUS_SECS = 60


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    files: dict[str, str] | None = None,
) -> Path:
    """A wheel of one module that knows its version, with a console script of its name."""
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": f"VERSION = '{version}'\ndef main():\n    import sys\n    print('{name}', VERSION, sys.prefix)\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {one}\n" for one in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name}-say = {name}:main\n",
        **(files or {}),
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text.encode())}\n"
        for path, text in contents.items()
    )
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**contents, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return wheel


async def extreme_versions(interpreters):
    """The oldest and the newest version on this machine."""
    usable = [one for one in await interpreters.discover() if one.version >= (3, 6)]
    return str(min(usable)), str(max(usable))


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory):
    """What can be installed without a network. pip and setuptools are those that Pythons of this machine bring."""
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "apple", "1.0")
    make_wheel(folder, "apple", "2.0")
    make_wheel(folder, "pear", "1.0", requires=("apple<2",))
    make_wheel(folder, "wheel", "0.37.1")
    make_wheel(
        folder,
        "plum",
        "1.0",
        files={
            "plum_start.pth": "import sys; sys.plum_was_here = True\n",
            "plum-1.0.data/data/share/plum/seed.txt": "stone",
            "plum-1.0.data/scripts/plum-binary": "\x7fnot a script",
        },
    )
    homes = {Path(os.path.realpath(sys.executable)).parents[1], *Path.home().glob(".pyenv/versions/*")}
    for home in homes:
        for wheel in home.glob("lib/python3.*/ensurepip/_bundled/*.whl"):
            (folder / wheel.name).write_bytes(wheel.read_bytes())
    return folder


@pytest.fixture
def environ(wheelhouse, tmp_path) -> dict[str, str]:
    here = {
        name: os.environ[name]
        for name in ("PATH", "SSL_CERT_FILE", "HTTPS_PROXY", "HTTP_PROXY")
        if name in os.environ
    }
    here |= {"HOME": str(Path.home()), "UV_FIND_LINKS": str(wheelhouse), "UV_HTTP_RETRIES": "0"}
    if any(wheelhouse.glob("pip-*.whl")):
        here["UV_NO_INDEX"] = "1"
    return here


@pytest.fixture
async def spawner():
    spawner = Spawner()
    yield spawner
    await spawner.aclose()


@pytest.fixture
def config(tmp_path) -> Environments:
    return Environments(cache_dir=tmp_path / "cache")


@pytest.fixture
def executor(config, spawner, environ) -> VenvExecutor:
    return VenvExecutor(config, spawner, environ=environ)


@pytest.fixture
def spec(tmp_path):
    """Makes the specification of another run."""
    count = iter(range(1000))

    def make(*requirements: str, **fields) -> RunSpec:
        run_dir = tmp_path / f"run{next(count)}"
        (run_dir / "workspace").mkdir(parents=True)
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(run_dir), "PIP_NO_INDEX": "1"}
        env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        values = {"run_dir": run_dir, "workspace": run_dir / "workspace", "filename": "main.py", "env": env}
        return RunSpec(**{**values, "requirements": requirements, **fields})

    return make


def run(prepared, *argv: str, check: bool = True) -> str:
    """What a program says in the run's environment."""
    env = dict(prepared.env)
    ended = subprocess.run(argv, env=env, stdout=-1, stderr=-2, text=True, timeout=GENEROUS_SECS, check=False)
    assert not check or ended.returncode == 0, ended.stdout
    return ended.stdout


def python(prepared, code: str) -> str:
    return run(prepared, prepared.argv[0], "-c", code).strip()


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file with its content; byte code that Python keeps beside what it imports left out."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("which", [0, 1], ids=["oldest", "newest"])
async def test_a_run_installs_into_its_own_environment_only(executor, spec, wheelhouse, tmp_path, which):
    version = (await extreme_versions(executor.interpreters))[which]
    async with executor.prepare(spec("apple==1.0", python=version), tmp_path / "log") as prepared:
        base = tmp_path / "cache" / "entries" / prepared.facts["environment"]
        thin = str(Path(prepared.argv[0]).parents[1])
        before = fingerprint(base)
        assert prepared.facts["python"] == version
        assert python(prepared, "import sys; print(sys.prefix)") == thin
        assert python(prepared, "import apple; print(apple.VERSION, apple.__file__)").startswith(
            f"1.0 {base}"
        )
        listed = run(prepared, "pip", "list", "--format=json")
        assert {"name": "apple", "version": "1.0"} in json.loads(listed[listed.index("[") :].splitlines()[0])
        # Upgrading what the base has, by the script and by the module; and something new.
        run(prepared, "pip", "install", "--find-links", str(wheelhouse), "apple==2.0")
        run(prepared, prepared.argv[0], "-m", "pip", "install", "--find-links", str(wheelhouse), "plum")
        assert python(prepared, "import apple; print(apple.VERSION, apple.__file__)").startswith(
            f"2.0 {thin}"
        )
        assert run(prepared, "apple-say").split() == ["apple", "2.0", thin]
        assert python(prepared, "import plum; print(plum.__file__)").startswith(thin)
        listed = run(prepared, "pip", "list", "--format=json")
        apples = [
            one for one in json.loads(listed[listed.index("[") :].splitlines()[0]) if one["name"] == "apple"
        ]
        assert apples == [{"name": "apple", "version": "2.0"}]
        assert fingerprint(base) == before
    async with executor.prepare(spec("apple==1.0", python=version), tmp_path / "log") as prepared:
        assert prepared.facts["environment_cached"] is True
        assert python(prepared, "import apple; print(apple.VERSION)") == "1.0"
        assert "1.0" in run(prepared, "apple-say")
        run(prepared, prepared.argv[0], "-m", "pip", "uninstall", "-y", "apple", check=False)
        assert fingerprint(base) == before


async def test_others_can_read_a_shared_environment_whatever_the_umask_is(environ, spec, tmp_path):
    """With --run-as: the workload is another user, the daemon's files are closed to others (systemd's UMask=0077)."""
    config = Environments(cache_dir=tmp_path / "shared", shared=True)
    mask = os.umask(0o077)
    spawner = Spawner()
    try:
        executor = VenvExecutor(config, spawner, environ=environ)
        async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
            base = config.cache_dir / "entries" / str(prepared.facts["environment"])
            assert not [
                str(path)
                for path in (base, *base.rglob("*"))
                if not path.is_symlink() and ~path.stat().st_mode & (0o005 if path.is_dir() else 0o004)
            ]
            for folder in (config.cache_dir, config.cache_dir / "entries"):
                assert folder.stat().st_mode & 0o777 == 0o711
            assert python(prepared, "import apple; print(apple.VERSION)") == "1.0"
        assert not (config.cache_dir / "locks").stat().st_mode & 0o077
        # Room is made of what no run uses.
        assert await executor.make_room(1 << 40) > 0
        assert not base.exists()
    finally:
        os.umask(mask)
        await spawner.aclose()


async def test_the_base_brings_its_start_up_lines_data_and_programs(executor, spec, tmp_path):
    async with executor.prepare(spec("plum==1.0"), tmp_path / "log") as prepared:
        thin = Path(prepared.argv[0]).parents[1]
        assert python(prepared, "import sys; print(sys.plum_was_here)") == "True"
        assert (thin / "share/plum/seed.txt").read_text() == "stone"
        assert (thin / "bin/plum-binary").is_symlink()
        run(prepared, prepared.argv[0], "-m", "pip", "--version")


async def test_the_command_and_its_environment(executor, spec, tmp_path):
    made = spec(args=("a b", "$c"), filename="./sub/../main.py")
    made = dataclasses.replace(made, env={**made.env, "PYTHONHOME": "/nowhere", "X": "1"})
    (made.workspace / "main.py").write_text("import sys, os\nprint(sys.argv[1:], os.environ['X'])\n")
    async with executor.prepare(made, tmp_path / "log") as prepared:
        bin_dir = made.run_dir / "env" / "bin"
        assert prepared.argv == (str(bin_dir / "python"), "main.py", "a b", "$c")
        assert prepared.env["PATH"] == f"{bin_dir}:/usr/local/bin:/usr/bin:/bin"
        assert prepared.env["VIRTUAL_ENV"] == str(made.run_dir / "env")
        assert "PYTHONHOME" not in prepared.env
        said = subprocess.run(
            prepared.argv, env=dict(prepared.env), cwd=made.workspace, stdout=-1, text=True, check=True
        )
        assert said.stdout == "['a b', '$c'] 1\n"
    async with executor.prepare(spec(filename="-m", args=("pip", "--version")), tmp_path / "log") as prepared:
        assert "pip" in run(prepared, *prepared.argv)
    async with executor.prepare(spec(filename="-c"), tmp_path / "log") as prepared:
        assert prepared.argv[1:] == ("./-c",)


async def test_with_the_option_the_nearest_python_is_taken(config, spawner, environ, spec, tmp_path):
    lenient = VenvExecutor(dataclasses.replace(config, fallback=True), spawner, environ=environ)
    async with lenient.prepare(spec(python="3.99"), tmp_path / "log") as prepared:
        told = str(prepared.facts["warnings"])
        assert "Python 3.99 is not on this machine" in told
        assert "--python-fallback" in told
        assert python(prepared, "print('runs')") == "runs"


@pytest.mark.parametrize(
    "fields",
    [
        {"filename": "../x.py"},
        {"filename": "/etc/passwd"},
        {"filename": "."},
        {"filename": "a/../../x.py"},
        {"filename": "-m"},
        {"filename": "x\0.py"},
        {"filename": "x.py", "args": ("a\0",)},
        {"filename": "x.py", "python": "2.5"},
        {"filename": "x.py", "requirements": ("???",)},
    ],
)
async def test_what_can_never_run_is_refused(executor, spec, tmp_path, fields):
    with pytest.raises(errors.UnsupportedRequest):
        async with executor.prepare(spec(**fields), tmp_path / "log"):
            pytest.fail("it was prepared")


async def test_many_at_once_share_one_build(executor, spec, tmp_path):
    async def one(number: int):
        async with executor.prepare(spec("apple==1.0"), tmp_path / f"log{number}") as prepared:
            return prepared.facts["environment"]

    keys = await asyncio.gather(*(one(number) for number in range(5)))
    assert len(set(keys)) == 1
    logs = [path.read_text() for path in tmp_path.glob("log*")]
    assert sum(text.count("apple==1.0") for text in logs) == 1


async def all_wait(executor: VenvExecutor, count: int) -> None:
    """So many wait for the same build."""
    async with asyncio.timeout(GENEROUS_SECS):
        while [flight.waiting for flight in executor.cache._flights._flights.values()] != [count]:
            await asyncio.sleep(0.01)


async def test_a_failed_build_says_why_to_all_who_wait_and_leaves_nothing(
    executor, spec, tmp_path, monkeypatch
):
    real = executor.cache._build

    async def build(*arguments):
        await all_wait(executor, 3)
        return await real(*arguments)

    monkeypatch.setattr(executor.cache, "_build", build)

    async def one(number: int):
        async with executor.prepare(spec("apple==9.9"), tmp_path / f"log{number}"):
            pytest.fail("it was prepared")

    failures = await asyncio.gather(*(one(number) for number in range(3)), return_exceptions=True)
    assert [type(failure) for failure in failures] == [errors.EnvironmentFailed] * 3
    assert "apple" in str(failures[0])
    assert "9.9" in str(failures[0])
    assert list((tmp_path / "cache" / "entries").iterdir()) == []
    assert len(list(tmp_path.glob("log*"))) == 1  # one build for all three


async def test_pins_that_contradict_each_other_are_installed_as_they_stand(executor, spec, tmp_path):
    async with executor.prepare(spec("pear==1.0", "apple==2.0"), tmp_path / "log") as prepared:
        assert python(prepared, "import apple, pear; print(apple.VERSION, pear.VERSION)") == "2.0 1.0"
        assert "contradict" in str(prepared.facts["warnings"])
    async with executor.prepare(spec("pear==1.0", "apple==2.0"), tmp_path / "log") as prepared:
        assert prepared.facts["environment_cached"]
        assert "contradict" in str(prepared.facts["warnings"])
    with pytest.raises(errors.EnvironmentFailed):
        async with executor.prepare(spec("pear", "apple==2.0"), tmp_path / "log"):
            pytest.fail("it was prepared")


async def test_a_local_package_is_built_from_the_workspace(executor, spec, tmp_path):
    made = spec("./fruit/quince-1.0-py3-none-any.whl")
    (made.workspace / "fruit").mkdir()
    make_wheel(made.workspace / "fruit", "quince", "1.0")
    async with executor.prepare(made, tmp_path / "log") as prepared:
        assert python(prepared, "import quince; print(quince.VERSION)") == "1.0"


async def test_cancelling_the_last_that_waits_ends_uv_and_leaves_nothing(executor, spec, tmp_path):
    """uv waits for an index that never answers; of two that wait for it the first leaves without harm."""
    async with stalled_server() as (url, asked):
        made = spec("apple", f"--index-url {url}")
        executor = VenvExecutor(
            Environments(cache_dir=tmp_path / "cache"),
            executor.interpreters._spawner,
            environ={"PATH": os.environ["PATH"], "HOME": str(Path.home())},
        )

        async def one(spec_, log):
            async with executor.prepare(spec_, tmp_path / log):
                pytest.fail("it was prepared")

        first = asyncio.create_task(one(made, "log1"))
        second = asyncio.create_task(one(dataclasses.replace(made, run_dir=made.run_dir / "b"), "log2"))
        await asyncio.to_thread(asked.wait, GENEROUS_SECS)
        await all_wait(executor, 2)
        first.cancel()
        await asyncio.wait([first])
        assert uvs(tmp_path)
        assert not second.done()
        second.cancel()
        await asyncio.wait([second])
        assert not uvs(tmp_path)
        assert list((tmp_path / "cache" / "entries").iterdir()) == []


def uvs(folder: Path) -> list[psutil.Process]:
    """The uv processes that work on `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            argv = process.cmdline()
            if argv and Path(argv[0]).name == "uv" and any(str(folder) in one for one in argv):
                found.append(process)
    return found


@contextlib.asynccontextmanager
async def stalled_server():
    """An index that takes requests and never answers; and an event that is set when it was asked."""
    asked, done = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            done.wait(GENEROUS_SECS)

    with served(Handler) as url:
        try:
            yield url, asked
        finally:
            done.set()


@contextlib.contextmanager
def served(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Broken(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


class Empty(Broken):
    def do_GET(self):
        self.send_error(404)


async def test_an_index_that_is_away_is_unreachable_and_one_that_lacks_it_is_not(
    config, spawner, spec, tmp_path, environ
):
    def executor(url: str) -> VenvExecutor:
        here = {name: environ[name] for name in ("PATH", "HOME")}
        return VenvExecutor(
            config, spawner, environ={**here, "UV_DEFAULT_INDEX": url, "UV_HTTP_RETRIES": "0"}
        )

    async def outcome(url: str, *lines: str) -> BaseException:
        with pytest.raises(errors.RunnerError) as caught:
            async with executor(url).prepare(spec("apple", *lines), tmp_path / "log"):
                pytest.fail("it was prepared")
        assert "canary" not in str(caught.value)
        assert "Using Python" not in str(caught.value)  # of which uv tells before anything goes wrong
        return caught.value

    with served(Broken) as url:
        failed = await outcome(url.replace("://", "://user:canary@"))
        assert isinstance(failed, errors.Unreachable)
        assert failed.endpoint == "package index"
        # What the message itself names is its own affair: an attempt, lest it is tried for ever.
        assert isinstance(
            await outcome("http://localhost:9/simple", f"--index-url {url}"), errors.EnvironmentFailed
        )
    assert isinstance(await outcome(url), errors.Unreachable)  # nobody listens any more
    with served(Empty) as url:
        assert isinstance(await outcome(url), errors.EnvironmentFailed)


async def test_secrets_of_the_runner_do_not_reach_a_build(config, spawner, environ, spec, tmp_path):
    made = spec("./fig")
    (made.workspace / "fig").mkdir()
    (made.workspace / "fig" / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "build"\nbackend-path = ["."]\n[project]\nname = "fig"\nversion = "1"\n'
    )
    (made.workspace / "fig" / "build.py").write_text(
        "import os\n"
        "def build_wheel(*args, **kwargs):\n"
        f"    open({str(tmp_path / 'seen')!r}, 'w').write(repr(dict(os.environ)))\n"
        "    raise SystemExit(1)\n"
    )
    secret = {
        "AWS_SECRET_ACCESS_KEY": "canary",
        "AMQP_URL": "amqp://u:canary@h/",
        "UV_PUBLISH_TOKEN": "canary",
        "GH_TOKEN": "canary",
    }
    executor = VenvExecutor(config, spawner, environ={**environ, **secret})
    with pytest.raises(errors.EnvironmentFailed):
        async with executor.prepare(made, tmp_path / "log"):
            pytest.fail("it was prepared")
    seen = (tmp_path / "seen").read_text()
    assert "PATH" in seen
    assert "canary" not in seen


async def test_a_daemon_killed_while_it_builds_leaves_no_uv_and_no_half_environment(executor, spec, tmp_path):
    """The next daemon builds the same; what the first had begun is gone."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from runner.config import Environments\nfrom runner.executors.base import RunSpec\n"
        "from runner.executors.venv import VenvExecutor\nfrom runner.process.spawner import Spawner\n"
        "async def main(root, url):\n"
        "    executor = VenvExecutor(Environments(cache_dir=root / 'cache'), Spawner())\n"
        "    spec = RunSpec(run_dir=root, workspace=root, filename='x', requirements=('apple', '--index-url ' + url))\n"
        "    async with executor.prepare(spec, root / 'log'):\n        pass\n"
        "asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))\n"
    )
    async with stalled_server() as (url, asked):
        daemon = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), url], cwd=Path(__file__).parents[2]
        )
        await asyncio.to_thread(asked.wait, GENEROUS_SECS)
        assert uvs(tmp_path)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        async with asyncio.timeout(GENEROUS_SECS):
            while uvs(tmp_path):
                await asyncio.sleep(0.05)
    entries = tmp_path / "cache" / "entries"
    assert [path.name.startswith(".new-") for path in entries.iterdir()] == [True]
    await executor.cache.evict()
    assert list(entries.iterdir()) == []


async def test_a_damaged_base_is_built_again(executor, spec, tmp_path):
    async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
        base = Path(python(prepared, "import apple; print(apple.__file__)"))
    base.unlink()
    async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
        assert prepared.facts["environment_cached"] is False
        assert python(prepared, "import apple; print(apple.VERSION)") == "1.0"


async def test_a_base_with_a_damaged_manifest_is_not_used_and_goes(executor, spec, tmp_path):
    async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
        entry = tmp_path / "cache" / "entries" / prepared.facts["environment"]
    (entry / "environment.json").write_text("")
    await executor.cache.evict()
    assert not entry.exists()
    async with executor.prepare(spec("apple==1.0"), tmp_path / "log"):
        (entry / "environment.json").write_text("")
        async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
            assert prepared.facts["environment_cached"] is False


async def test_over_the_quota_the_least_used_goes_and_what_is_in_use_stays(spawner, environ, spec, tmp_path):
    executor = VenvExecutor(
        Environments(cache_dir=tmp_path / "cache", cache_bytes=1), spawner, environ=environ
    )
    entries = tmp_path / "cache" / "entries"
    async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as used:
        async with executor.prepare(spec("apple==2.0"), tmp_path / "log") as idle:
            pass
        await executor.cache.evict()
        assert [path.name for path in entries.iterdir()] == [used.facts["environment"]]
        assert idle.facts["environment"] != used.facts["environment"]
        assert python(used, "import apple; print(apple.VERSION)") == "1.0"
    await executor.cache.evict()
    assert list(entries.iterdir()) == []
    async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
        assert prepared.facts["environment_cached"] is False


async def test_another_daemon_of_the_same_cache_waits_uses_and_protects(
    config, spawner, environ, spec, tmp_path
):
    one, other = (VenvExecutor(config, spawner, environ=environ) for _ in range(2))

    async def prepare(executor: VenvExecutor, log: str) -> bool:
        async with executor.prepare(spec("apple==1.0"), tmp_path / log) as prepared:
            return bool(prepared.facts["environment_cached"])

    await asyncio.gather(prepare(one, "log1"), prepare(other, "log2"))
    assert (
        sum((tmp_path / log).exists() and "apple" in (tmp_path / log).read_text() for log in ("log1", "log2"))
        == 1
    )
    hungry = VenvExecutor(dataclasses.replace(config, cache_bytes=1), spawner, environ=environ)
    async with one.prepare(spec("apple==1.0"), tmp_path / "log"):
        await hungry.cache.evict()
        assert await prepare(other, "log2") is True


async def test_a_cache_has_one_name_only_and_may_move(config, spawner, environ, spec, tmp_path):
    """As where a state directory is a link, or is restored to another place."""
    link = tmp_path / "link"
    link.symlink_to(config.cache_dir)
    config.cache_dir.mkdir()
    for cache, cached in ((link, False), (config.cache_dir, True), (tmp_path / "moved", False)):
        if cache.name == "moved":
            config.cache_dir.rename(cache)
        executor = VenvExecutor(dataclasses.replace(config, cache_dir=cache), spawner, environ=environ)
        async with executor.prepare(spec("apple==1.0"), tmp_path / "log") as prepared:
            assert prepared.facts["environment_cached"] is cached
            link.unlink(missing_ok=True)  # it is not needed any more
            assert python(prepared, "import apple; print(apple.VERSION)") == "1.0"


async def test_what_is_not_pinned_ages_out(executor, spec, tmp_path, monkeypatch):
    clock = [1_000_000_000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    keys: dict[str, list[object]] = {"apple": [], "apple==1.0": []}
    for clock[0] in (1_000_000_000.0, 1_000_086_400.0):
        for line, seen in keys.items():
            async with executor.prepare(spec(line), tmp_path / "log") as prepared:
                seen.append(prepared.facts["environment"])
    assert keys["apple==1.0"][0] == keys["apple==1.0"][1]
    assert keys["apple"][0] != keys["apple"][1]
    await executor.cache.evict()
    left = {path.name for path in (tmp_path / "cache" / "entries").iterdir()}
    assert left == {keys["apple==1.0"][0], keys["apple"][1]}


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_what_the_real_client_freezes_is_built_from_the_real_index(config, spawner, spec, tmp_path):
    """Needs the package index, and the Python that the list was made on."""
    executor = VenvExecutor(config, spawner)
    message = json.loads((CAPTURED / "plain.json").read_text())["experiment"]
    made = spec(*message["pythonenv"], python=message["pythonver"])
    try:
        await executor.interpreters.choose(made.python, fallback=False)
    except errors.UnsupportedRequest as exc:
        pytest.skip(str(exc))
    try:
        async with executor.prepare(made, tmp_path / "log") as prepared:
            versions = run(prepared, prepared.argv[0], "-m", "pip", "freeze", "--all")
            assert re.search(r"^studioml==0.0.49$", versions, re.MULTILINE)
            assert python(prepared, "import studio, numpy; print(numpy.__version__)").endswith("1.24.4")
    except errors.Unreachable as exc:
        pytest.skip(str(exc))
