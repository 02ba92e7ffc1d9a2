"""The workload's environment variables (INTEROP.md 3.10). Pure: nothing of the runner's own environment passes but an allow-list."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runner.experiment.workspace import Workspace
    from runner.request.model import Request, Resources

#: What may pass from the runner to the workload: never a credential of the runner's (DESIGN.md rule 9).
_ALLOWED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TZ|TERM|LANG|LANGUAGE|LC_\w+|LD_LIBRARY_PATH|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|"
    r"CUDA_(HOME|PATH|ROOT|CACHE_PATH|CACHE_MAXSIZE|DEVICE_MAX_CONNECTIONS)|CUDNN_\w+|NCCL_\w+|TF_\w+|XLA_\w+|KMP_\w+|"
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|CERT|DEFAULT_TIMEOUT|DISABLE_PIP_VERSION_CHECK)|"
    r"(HTTPS?|FTP|NO|ALL)_PROXY|(https?|ftp|no|all)_proxy"
)
#: What may pass into a container: nothing that names a file or a user of this machine.
_ALLOWED_INSIDE = re.compile(
    r"TZ|TERM|LANG|LANGUAGE|CUDA_DEVICE_MAX_CONNECTIONS|NCCL_\w+|TF_\w+|XLA_\w+|KMP_\w+|"
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|DEFAULT_TIMEOUT|DISABLE_PIP_VERSION_CHECK)|"
    r"(HTTPS?|FTP|NO|ALL)_PROXY|(https?|ftp|no|all)_proxy"
)
#: What `%PATH%` stands for where the image has a PATH of its own: what engines give to images that say nothing.
_PATH_INSIDE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: `scheme://user:password@host`: the operator's, not the workload's.
_USERINFO = re.compile(r"(?<=://)[^/@\s]*@")
_PERCENT = re.compile(r"%([A-Za-z_][A-Za-z0-9_]*)%")
_DOLLAR = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def workload(
    request: Request,
    workspace: Workspace,
    granted: Resources,
    own: Mapping[str, str],
    gpus: Sequence[str] = (),
) -> dict[str, str]:
    """The complete environment of the program, but for what the executor adds. `own` is the runner's environment.

    `gpus`: the UUIDs of the cards that it was given; it sees no others.

    `%NAME%`, `$NAME` and `${NAME}` in a value of `config.env` stand for a variable of the environment built so far;
    unknown names stay as they are. `config.env` wins over all but what makes the directory layout work, and the cards. In a
    container PATH and the like are the image's, HOME is the run's directory, and the locale is one that every image has.
    """
    inside = request.container is not None
    allowed = _allowed_inside if inside else _allowed
    env = {name: _USERINFO.sub("", value) for name, value in own.items() if allowed(name)}
    threads = str(max(1, granted.cpus))
    env.update(
        {
            "AWS_SDK_LOAD_CONFIG": "1",
            "LC_ALL": "en_US.utf8",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "GOTO_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
    )
    if inside:
        env |= {"LC_ALL": "C.UTF-8", "HOME": str(workspace.root)}
    else:
        env.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
    if granted.cpus > 1:
        env["OPENMP"] = "True"
    known = {"PATH": _PATH_INSIDE} | env
    env.update({name: _expand(value, known) for name, value in request.env.items()})
    env.update(
        {
            "STUDIOML_HOME": str(workspace.root),
            "STUDIOML_EXPERIMENT": workspace.run_id,
            "TMPDIR": str(workspace.tmp),
            "CUDA_VISIBLE_DEVICES": ",".join(gpus) or "-1",
            "NVIDIA_VISIBLE_DEVICES": ",".join(gpus) or "-1",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }
    )
    env.pop("STUDIOML_ARTIFACT_MAPPING", None)  # the client then finds ../<tag> beside the workspace
    return env


@functools.cache
def _allowed(name: str) -> bool:
    return _ALLOWED.fullmatch(name) is not None


@functools.cache
def _allowed_inside(name: str) -> bool:
    return _ALLOWED_INSIDE.fullmatch(name) is not None


def _expand(value: str, known: Mapping[str, str]) -> str:
    value = _PERCENT.sub(lambda found: known.get(found[1], found[0]), value)
    return _DOLLAR.sub(lambda found: known.get(found[1] or found[2], found[0]), value)
