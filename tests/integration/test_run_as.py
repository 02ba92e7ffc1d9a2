"""`--run-as`: workloads under another user, who reaches what is theirs and nothing else of ours."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.executors.base import Prepared
from runner.experiment import runas
from runner.experiment.workspace import Workspace
from runner.process.base import User
from tests.integration import harness
from tests.integration.harness import daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from runner.executors.base import RunSpec


def _can_become_another() -> bool:
    """Root may lack the rights in a container: tried, not asked."""
    if os.geteuid() != 0:
        return False
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


as_root = pytest.mark.skipif(
    not _can_become_another(), reason="NOT PROVEN HERE: only root can start programs as another user"
)
UID = 54321  #: of nobody on this machine


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others may enter: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(autouse=True)
def _with_sh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of the tests may lie where only root comes; a shell is everybody's."""

    @contextlib.asynccontextmanager
    async def prepare(_: object, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        del log
        yield Prepared(argv=("/bin/sh", spec.filename or ""), env=spec.env)

    monkeypatch.setattr(harness.ThisPython, "prepare", prepare)


OWN = """
echo "uid $(id -u) groups $(id -G | wc -w) home $HOME user $USER $LOGNAME"
grep -E '^(NoNewPrivs|CapEff)' /proc/self/status
echo model > ../modeldir/model && mkdir -p ../modeldir/deep && echo x > ../modeldir/deep/file && echo "wrote the model"
echo y > mine && rm main.py && echo "changed the workspace"
touch $TMPDIR/t && touch $HOME/h && echo "has a temporary directory"
mkdir ../more && echo "made a directory beside"
echo "-- and may not"
for path in ../../../_runner ../../../_runner/request.json ../../../.. ../../../../../state ../../../../../state/ledger.sqlite; do
    ls $path 2>/dev/null && echo "LISTED $path"; head -c1 $path 2>/dev/null && echo "READ $path"
done
mv ../output ../elsewhere 2>/dev/null && echo "MOVED output"
ln -s /etc ../../../out 2>/dev/null && echo "WROTE beside"
echo done
"""


@as_root
async def test_a_workload_has_what_is_its_own_and_nothing_else_of_ours(place: Path) -> None:
    async with daemon(place, runs={"run_as": str(UID)}) as it:
        await it.submit(OWN)
        await it.settled()
        lines = it.output().splitlines()
        # Its own number and the run's group: it has no entry in the list of users, and no home there.
        assert lines[0].startswith(f"uid {UID} groups 2 home ")
        assert lines[0].endswith(f"/tmp user {UID} {UID}")
        assert sorted(line.split()[1] for line in lines[1:3]) == ["0000000000000000", "1"]
        assert lines[3:] == [
            "wrote the model",
            "changed the workspace",
            "has a temporary directory",
            "made a directory beside",
            "-- and may not",
            "done",
        ]
        with tarfile.open(it.storage / "experiments/exp/modeldir.tar") as archive:
            assert {name.removeprefix("./") for name in archive.getnames()} >= {"model", "deep/file"}
        (document,) = it.documents()
        assert document["studioml"]["status"] == "completed"
    assert not it.runs
    assert not it.dead()


@as_root
async def test_runs_of_one_user_cannot_look_into_each_other(place: Path) -> None:
    async with daemon(place, runs={"run_as": str(UID)}) as it:
        await it.submit("echo secret > private; echo $$; while [ ! -e go ]; do sleep 0.1; done", key="first")
        pid = await it.until(lambda: it.printed().strip().decode())
        (first,) = it.runs
        assert Path(f"/proc/{pid}").stat().st_uid == UID
        await it.submit(
            f"cat {first}/experiments/*/workspace/private {first}/experiments/{first.name}/workspace/private 2>/dev/null\n"
            f"cat /proc/{pid}/environ /proc/{pid}/cwd/private 2>/dev/null\nls {first} 2>/dev/null; echo nothing",
            key="second",
            queue="rmq_b",
        )
        await it.until((it.storage / "experiments/second/output.tar").exists)
        assert it.output("second") == "nothing\n"
        (first / "experiments" / first.name / "workspace" / "go").touch()
        await it.settled()


@as_root
async def test_what_does_not_end_is_killed_and_its_directory_is_removed(place: Path) -> None:
    script = """
mkdir -p ../modeldir/closed/in && chmod 0 ../modeldir/closed
(trap '' TERM; setsid sh -c 'sleep 7654; true' &)
sleep 7654
"""
    async with daemon(place, runs={"run_as": "nobody"}) as it:
        await it.submit(script, max_duration="1s")
        await it.settled()
        (document,) = it.documents()
        assert document["studioml"]["reason"] == "timeout"
        nobody = pwd.getpwnam("nobody").pw_uid
        mine = [
            path
            for path in Path("/proc").glob("[0-9]*")
            if _owner(path) == nobody and b"sleep\x007654" in _line(path)
        ]
        assert not mine
    assert not it.runs


def _owner(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_uid
    return -1


def _line(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (path / "cmdline").read_bytes()
    return b""


def resolved(name: str) -> User:
    user = runas.resolve(name)
    assert user is not None
    return user


def test_who_is_meant(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    nobody = resolved("nobody")
    assert (nobody.name, nobody.uid) == ("nobody", pwd.getpwnam("nobody").pw_uid)
    assert resolved(str(UID)).uid == UID
    both = resolved(f"{UID}:777")
    assert (both.uid, both.gid, both.name) == (UID, 777, str(UID))
    assert runas.resolve("") is None
    for name, why in (
        ("no-such-user", "no user of that name"),
        ("root", "root itself"),
        ("0", "root itself"),
    ):
        with pytest.raises(errors.UsageError, match=why):
            runas.resolve(name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(errors.UsageError, match="only root can start programs as another user"):
        runas.resolve("nobody")


def test_a_working_directory_that_the_user_cannot_enter_is_refused_with_its_name(place):
    closed = place / "closed"
    (closed / "runs").mkdir(parents=True)
    closed.chmod(0o700)
    user = User(name="x", uid=UID, gid=UID)
    with pytest.raises(errors.UsageError, match=f"cannot enter {closed}, where runs are"):
        runas.open_up(closed / "runs", user)
    closed.chmod(0o711)
    runas.open_up(closed / "runs", user)
    assert stat.S_IMODE((closed / "runs").stat().st_mode) == 0o711


@as_root
def test_a_file_that_has_names_outside_of_the_run_stays_ours(place):
    workspace = Workspace.create(place / "runs", "key")
    shared = place / "shared"
    shared.write_text("of the cache")
    env = workspace.root / "env"
    env.mkdir()
    os.link(shared, env / "shared")
    (env / "one").write_text("x")
    os.link(env / "one", env / "two")
    (env / "link").symlink_to(shared)
    user = runas.hand_over(workspace, User(name="x", uid=UID, gid=777, groups=(777, 888)))
    assert user.groups == (777, 888)
    assert user.gid >= runas.FIRST_GROUP
    assert shared.stat().st_uid == 0
    assert {(env / name).lstat().st_uid for name in ("one", "two", "link")} == {UID}
    assert workspace.private.stat().st_uid == 0
    assert stat.S_IMODE(workspace.private.stat().st_mode) == 0o700


@as_root
def test_nothing_is_given_away_through_a_link_in_the_place_of_the_outputs_directory(place):
    """What made a run ready, in a container say, may have left one there."""
    workspace = Workspace.create(place / "runs", "key")
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "output").write_text("of the host")
    workspace.output.parent.rmdir()
    workspace.output.parent.symlink_to(elsewhere)
    with pytest.raises(NotADirectoryError):
        runas.hand_over(workspace, User(name="x", uid=UID, gid=UID))
    assert (elsewhere / "output").stat().st_uid == 0
