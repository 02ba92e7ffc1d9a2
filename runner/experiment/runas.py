"""Workloads under another user than the daemon's (`--run-as`): who that is, and what of a run's directory becomes theirs.

::

    <working-dir>/runs/                     daemon  0711   names cannot be listed
      <run>/                                daemon, group of the run  0710   only this run's processes come through
        experiments/, experiments/<id>/     daemon, group of the run  0750, 1770   its own directories cannot be replaced
          workspace/ output/ ...            daemon, group of the run  0770
            whatever is in them             the user's
        env/  tmp/                          daemon, group of the run  0770; what is in them, the user's
        _runner/                            daemon  0700

All workloads have the same user, so what keeps them apart is the group: each run has one of its own, a number that nobody else
has, and different groups may not look into each other's processes either. The daemon, being root, reads and removes everything.
Directories that the daemon opens by name stay its own, in a sticky one: a workload cannot put a link in their place.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import pwd
import stat
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.process.base import User
from runner.process.tail import open_unlinked

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from runner.experiment.workspace import Workspace

log = structlog.get_logger(__name__)

#: Groups of runs begin here: above what systems, containers and directories of users give away, below 2**31.
FIRST_GROUP, GROUPS = 0x7010_0000, 1 << 19


def resolve(name: str) -> User | None:
    """Whom `--run-as` names; None when it is empty.

    Raises:
        errors.UsageError: there is no such user, or the daemon is not root.
    """
    if not name:
        return None
    if os.geteuid() != 0:
        raise errors.UsageError(
            f"--run-as {name}: only root can start programs as another user: start the daemon as root, or leave it out"
        )
    uid, _, gid = name.partition(":")
    try:
        entry = pwd.getpwuid(int(uid)) if uid.isdecimal() else pwd.getpwnam(uid)
    except KeyError:
        if not uid.isdecimal():
            raise errors.UsageError(f"--run-as {name}: this machine has no user of that name") from None
        user = User(name=uid, uid=int(uid), gid=int(gid or uid))
    else:
        own = int(gid) if gid else entry.pw_gid
        groups = tuple(os.getgrouplist(entry.pw_name, own))
        user = User(name=entry.pw_name, uid=entry.pw_uid, gid=own, groups=groups, home=entry.pw_dir)
    if user.uid == 0:
        raise errors.UsageError(f"--run-as {name}: that is root itself; name a user without rights")
    return user


def open_up(runs: Path, user: User) -> None:
    """Let that user pass through to the directories of runs, and not list them.

    Raises:
        errors.UsageError: a directory above it lets nobody in; it names the directory.
    """
    runs.chmod(0o711)
    if (directory := closed(runs, user)) is not None:
        raise errors.UsageError(
            f"--run-as {user.name}: that user cannot enter {directory}, where runs are: "
            f"name another --working-dir, or `chmod o+x {directory}`"
        )


def closed(path: Path, user: User) -> Path | None:
    """The directory above `path` that lets that user not pass; None: all do. Blocking; raises OSError."""
    for directory in path.absolute().parents:
        info = directory.stat()
        mine = info.st_mode & stat.S_IXOTH
        if info.st_uid == user.uid:
            mine = info.st_mode & stat.S_IXUSR
        elif info.st_gid in {user.gid, *user.groups}:
            mine = info.st_mode & stat.S_IXGRP
        if not mine:
            return directory
    return None


def hand_over(workspace: Workspace, user: User) -> User:
    """Give a staged run to that user, and say as whom its processes run: with the run's group first. Blocking.

    Nothing of the run is alive yet, so nobody changes it meanwhile. Files with names outside of the run (links into the
    cache of environments) stay whose they are. Raises OSError.
    """
    digest = hashlib.sha256(os.fsencode(workspace.root)).digest()
    group = FIRST_GROUP + int.from_bytes(digest[:4]) % GROUPS
    try:
        os.chown(workspace.root, 0, group)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        log.warning(
            "runs can see into each other: this container has no group ids to give them", user=user.name
        )
        group = user.gid
    experiment = workspace.workspace.parent
    for directory, mode in ((workspace.root, 0o710), (experiment.parent, 0o750), (experiment, 0o1770)):
        os.chown(directory, 0, group)
        directory.chmod(mode)
    for directory in (*experiment.iterdir(), workspace.root / "env", workspace.tmp):
        if directory.is_dir() and not directory.is_symlink():
            _give(directory, user.uid, group)
            os.chown(directory, 0, group)
            directory.chmod(0o770)
    output = open_unlinked(workspace.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK)
    try:
        os.fchown(output, user.uid, group)
    finally:
        os.close(output)
    return dataclasses.replace(user, gid=group, groups=tuple(dict.fromkeys((user.gid, *user.groups))))


def _give(top: Path, uid: int, gid: int) -> None:
    """All below `top`. A file with several names is given when all of them are below it."""
    names: dict[int, tuple[int, str]] = {}
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = f"{folder}/{name}"
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode) or info.st_nlink == 1:
                os.chown(path, uid, gid, follow_symlinks=False)
                continue
            seen = names.get(info.st_ino, (0, ""))[0] + 1
            names[info.st_ino] = seen, path
            if seen == info.st_nlink:
                os.chown(path, uid, gid, follow_symlinks=False)


def environment(env: Mapping[str, str], user: User, workspace: Workspace) -> dict[str, str]:
    """The workload's variables with that user's name and home; the run's `tmp` where they have none of their own."""
    home = user.home
    try:
        usable = bool(home) and os.stat(home).st_uid == user.uid  # noqa: PTH116
    except OSError:
        usable = False
    theirs = {"USER": user.name, "LOGNAME": user.name, "HOME": home if usable else str(workspace.tmp)}
    # What the message itself sets stays.
    return dict(env) | {
        name: value for name, value in theirs.items() if env.get(name) == os.environ.get(name)
    }
