"""The completion service of the real StudioML client gets its results from a real daemon.

CompletionService and its program completion_service_client.py are the client's own, from its wheel on PyPI. That wheel
(0.0.49) holds the modules of two layouts, and these two still name some functions where they used to be: as it is, neither can
even be imported. `OLD_NAMES` and `REPAIR` put the few names back; all that is done is the client's code, unchanged.
"""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.servers.studioml_client import account, ended, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.daemon import Daemon
    from tests.servers.rabbitmq import RabbitmqServer

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(300)]

QUEUE = "rmq_completion_x"
BUCKET = "completion"

#: For the submitting side: `studio.experiment`, `studio.logs` and functions of `studio/util.py` are `studio.experiments.experiment`,
#: `studio.util.logs` and functions of `studio/util/util.py` and `studio/extra_util.py` now.
OLD_NAMES = """
import functools, sys, types
import studio, studio.extra_util, studio.util, studio.util.logs, studio.util.util
from studio.dependencies_policies.studio_dependencies_policy import StudioDependencyPolicy
from studio.experiments.experiment import create_experiment
studio.logs = sys.modules["studio.logs"] = studio.util.logs
studio.util.parse_verbosity = studio.util.util.parse_verbosity
old = sys.modules["studio.experiment"] = types.ModuleType("studio.experiment")
old.create_experiment = functools.partial(create_experiment, dependency_policy=StudioDependencyPolicy())
"""
#: For the side of the workload, where the runner has installed the same wheel: Python reads a sitecustomize.py from PYTHONPATH.
REPAIR = """
import studio, studio.logs, studio.util, studio.util.util
from studio.artifacts import artifacts_tracker
studio.logs.get_logger = studio.logs.getLogger
studio.util.rm_rf = studio.util.util.rm_rf
artifacts_tracker.get_experiment = artifacts_tracker.get_artifact
"""
PROGRAM = (
    OLD_NAMES
    + """
import json, os
config, queue, job, mydata, repair = sys.argv[1:]

def rsync_cp(source, dest, *rest):
    studio.extra_util.rsync_cp(source, dest, *rest)
    with open(os.path.join(dest, "sitecustomize.py"), "w") as file:
        file.write(repair)

studio.util.rsync_cp = rsync_cp
from studio.completion_service import CompletionService

settings = {"queue": queue, "resources_needed": {}, "sleep_time": 1}
with CompletionService("e2e", settings, studio_config_file=config) as service:
    keys = [service.submitTaskWithFiles(job, {"number": number}, {"mydata": mydata}, job_id=number) for number in (3, 4)]
    results = []
    for key in keys:
        results.append(service.getResultsWithTimeout(200))
        assert results[-1] is not None, service.submitted
print(json.dumps([keys, results]))
"""
)
JOB = """
import os
def clientFunction(args, files):
    with open(files["mydata"]) as file:
        data = file.read()
    print("working on", args["number"])
    return {"square": args["number"] ** 2, "data": data, "cwd": os.path.basename(os.getcwd())}
"""


@pytest.fixture
def daemon(
    client_interpreter: Path, client_environments: Path, rabbitmq: RabbitmqServer, tmp_path: Path
) -> Iterator[Daemon]:
    with serving(tmp_path / "daemon", rabbitmq, client_environments, match=f"^{QUEUE}$") as daemon:
        yield daemon


def test_results_come_back_to_the_completion_service(
    client_interpreter, client_broker, daemon: Daemon, *, rabbitmq: RabbitmqServer, seaweedfs, tmp_path
):
    client = account(
        client_interpreter, tmp_path / "home", client_broker, seaweedfs, BUCKET, env={"PYTHONPATH": "."}
    )
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "mydata.txt").write_text("some data")

    try:
        keys, results = client.python(
            PROGRAM, str(client.config), QUEUE, f"{tmp_path}/job.py", f"{tmp_path}/mydata.txt", REPAIR
        )
    except AssertionError as exc:
        exc.add_note(daemon.log_text()[-8000:])
        raise

    assert keys == ["completion_service_e2e_3", "completion_service_e2e_4"]
    assert dict(results) == {
        keys[0]: {"square": 9, "data": "some data", "cwd": "workspace"},
        keys[1]: {"square": 16, "data": "some data", "cwd": "workspace"},
    }
    # The service takes its queue away as soon as it has its results: that is no reason to call these runs cancelled.
    runs = [ended(daemon, key) for key in keys]
    assert {(run["status"], run["reason"], run["fate"]) for run in runs} == {("completed", "exit", "ack")}
    assert rabbitmq.api("GET", f"/api/queues/%2F/{QUEUE}")[0] == 404
    for key in keys:
        with (
            seaweedfs.client().get_object(BUCKET, f"experiments/{key}/retval.tar") as answer,
            tarfile.open(fileobj=answer, mode="r|") as archive,
        ):
            assert archive.getnames() == ["./retval"]  # with any other name the service waits for ever
