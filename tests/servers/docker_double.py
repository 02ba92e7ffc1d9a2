"""A double of an engine's client that writes down what it is asked and answers as told: for flags that no test machine can follow.

It is a program of its own, found on PATH as `docker` or `podman`; it runs nothing. What is proved with it is command lines.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pathlib

IMAGE = {"Id": "sha256:" + "ab" * 32, "Config": {"Env": ["PATH=/opt/image/bin:/bin"], "Cmd": ["serve"]}}
ENDED = {"Status": "exited", "ExitCode": 0, "OOMKilled": False, "Error": ""}

_SCRIPT = """#!{python} -IS
import json, os, pathlib, sys
here, argv = pathlib.Path({here!r}), sys.argv[1:]
files = {{arg: pathlib.Path(arg[11:]).read_text() for arg in argv if arg.startswith("--env-file=")}}
with (here / "asked").open("a") as asked:
    asked.write(json.dumps({{"argv": argv, "env": dict(os.environ), "files": files}}) + "\\n")
for words, text, code in json.loads((here / "answers").read_text()):
    if " ".join(argv).startswith(words[0]) and all(word in " ".join(argv) for word in words):
        print(text)
        sys.exit(code)
"""


class DockerDouble:
    """The first answer that fits the command counts; without one it succeeds in silence."""

    def __init__(self, directory: pathlib.Path, name: str = "docker") -> None:
        self.directory = directory
        self.program = directory / name
        self.program.write_text(_SCRIPT.format(python=sys.executable, here=str(directory)))
        self.program.chmod(0o700)
        self._answers: list[tuple[list[str], str, int]] = [
            (["info"], json.dumps({"SecurityOptions": ["name=seccomp,profile=default"]}), 0),
            (["image", "inspect"], json.dumps(IMAGE), 0),
            (["container", "inspect"], json.dumps(ENDED), 0),
            (["run", "version_info"], "WARNING: something else\nPython=3.11.7", 0),
        ]
        self._write()

    def answer(self, *words: str, text: Any = "", code: int = 0) -> None:
        """From now on, to commands that begin with the first word and have the others; before the answers given so far."""
        said = text if isinstance(text, str) else json.dumps(text)
        self._answers.insert(0, (list(words), said, code))
        self._write()

    def _write(self) -> None:
        (self.directory / "answers").write_text(json.dumps(self._answers))

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Every command so far: `argv`, the client's `env`, and the environment `files` that it names."""
        return [json.loads(line) for line in (self.directory / "asked").read_text().splitlines()]

    def commands(self, *words: str) -> list[list[str]]:
        """Those that begin with the first word and have the others."""
        lines = [(" ".join(each["argv"]), each["argv"]) for each in self.asked]
        return [
            argv for line, argv in lines if line.startswith(words[0]) and all(word in line for word in words)
        ]
