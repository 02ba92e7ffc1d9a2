"""Every path of one run.

::

    <working-dir>/runs/<id>/                 STUDIOML_HOME of the workload; removed after the run
        experiments/<id>/                    STUDIOML_EXPERIMENT is <id>
            workspace/                       working directory of the program
            output/output                    what it prints
            modeldir/ tb/ retval/ ...        one directory an artifact, siblings of the workspace (INTEROP.md 3.9)
        env/                                 the run's own Python environment
        tmp/                                 TMPDIR
        _runner/                             the runner's: builder's output, the run's log, the document, the request
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """The directory of one run. All of it is private to the runner's user."""

    root: Path

    @classmethod
    def create(cls, runs: Path, key: str) -> Workspace:
        """A new directory below `runs`, named by a hash of the experiment's key and the lowest number that is free.

        Raises:
            OSError: the disk is full or read-only.
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for number in itertools.count():
            workspace = cls(root=runs / f"{digest}.{number}")
            try:
                workspace.root.mkdir(mode=0o700, parents=True)
            except FileExistsError:
                continue
            experiments = workspace.workspace.parent
            directories = (experiments.parent, experiments, workspace.workspace, workspace.output.parent)
            for directory in (*directories, workspace.tmp, workspace.private):
                directory.mkdir(mode=0o700)
            return workspace
        raise AssertionError  # count() does not end

    @property
    def run_id(self) -> str:
        """Unique among the runs of this working directory while it exists."""
        return self.root.name

    def artifact(self, tag: str) -> Path:
        """The directory of an artifact. `tag` is a safe single component: `request.decode` refuses others."""
        return self.root / "experiments" / self.run_id / tag

    @property
    def workspace(self) -> Path:
        """Where the program starts."""
        return self.artifact("workspace")

    @property
    def output(self) -> Path:
        """Where stdout and stderr of the program go."""
        return self.artifact("output") / "output"

    @property
    def tmp(self) -> Path:
        """The workload's TMPDIR."""
        return self.root / "tmp"

    @property
    def private(self) -> Path:
        """The runner's own files of this run; never uploaded as a directory."""
        return self.root / "_runner"

    @property
    def builder_log(self) -> Path:
        """What the environment's builder printed."""
        return self.private / "environment.log"

    @property
    def runner_log(self) -> Path:
        """The daemon's records of this run, as JSON lines; becomes `runner-host-*.log`."""
        return self.private / "runner.log"

    @property
    def document(self) -> Path:
        """The last metadata document that was written for this run."""
        return self.private / "scrape.json"

    @property
    def request(self) -> Path:
        """The message as it came, secrets included; mode 0600. Lets a restarted daemon deliver what this run left."""
        return self.private / "request.json"

    def remove(self) -> None:
        """Remove all of it. Blocking. What cannot be removed stays, and the next start of the daemon tries again."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self.root.exists():  # a workload may have taken away its own rights
            for directory, _, _ in os.walk(self.root):
                with contextlib.suppress(OSError):
                    os.chmod(directory, 0o700)  # noqa: PTH101 - names from walk are text
            shutil.rmtree(self.root, ignore_errors=True)
