from __future__ import annotations

from pathlib import Path

import pytest

from runner.experiment import environ
from runner.experiment.workspace import Workspace
from runner.request.model import Container, Request, Resources

OWN = {
    "PATH": "/opt/tools:/usr/bin",
    "HOME": "/home/runner",
    "AMQP_URL": "amqp://user:canary@broker/",
    "AWS_SECRET_ACCESS_KEY": "canary",
    "AWS_ACCESS_KEY_ID": "canary",
    "GOOGLE_APPLICATION_CREDENTIALS": "/canary.json",
    "STUDIOML_ARTIFACT_MAPPING": "/canary",
    "HTTPS_PROXY": "http://user:canary@proxy:3128",
    "PIP_INDEX_URL": "https://user:canary@index/simple",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "LD_PRELOAD": "/canary.so",
}


def built(env=None, cpus=2, gpus=()):
    workspace = Workspace(root=Path("/runs/abc.0"))
    return environ.workload(Request(key="k", env=env or {}), workspace, Resources(cpus=cpus), OWN, gpus)


def test_nothing_of_the_runners_own_secrets_passes():
    env = built()
    assert "canary" not in repr(env)
    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert env["TF_CPP_MIN_LOG_LEVEL"] == "2"


def test_percent_and_dollar_names_stand_for_the_runners_variables_and_unknown_ones_stay():
    env = built({"PATH": "%PATH%:./bin", "A": "$HOME/x ${HOME} %NOPE% $NOPE", "B": "%AWS_SECRET_ACCESS_KEY%"})
    assert env["PATH"] == "/opt/tools:/usr/bin:./bin"
    assert env["A"] == "/home/runner/x /home/runner %NOPE% $NOPE"
    assert env["B"] == "%AWS_SECRET_ACCESS_KEY%"


def test_in_a_container_the_files_and_the_user_of_this_machine_are_unknown():
    request = Request(
        key="k",
        env={"OWN": "%PATH%:./bin", "LANGUAGE": "de"},
        container=Container(engine="docker", reference="a"),
    )
    own = OWN | {"LD_LIBRARY_PATH": "/opt/cuda", "USER": "me", "TZ": "Europe/Berlin"}
    env = environ.workload(request, Workspace(root=Path("/runs/abc.0")), Resources(cpus=2), own)
    assert {"PATH", "LD_LIBRARY_PATH", "USER"}.isdisjoint(env)
    assert env["OWN"].startswith("/usr/local/sbin:")
    assert (env["HOME"], env["LC_ALL"], env["TZ"]) == ("/runs/abc.0", "C.UTF-8", "Europe/Berlin")
    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert "canary" not in repr(env)


def test_values_are_never_shell_text():
    assert built({"A": "`id` $(id) \"'"})["A"] == "`id` $(id) \"'"


def test_the_layout_of_the_reference():
    env = built({"STUDIOML_HOME": "/elsewhere", "OMP_NUM_THREADS": "7"}, cpus=3)
    assert env["STUDIOML_HOME"] == "/runs/abc.0"
    assert env["STUDIOML_EXPERIMENT"] == "abc.0"
    assert Path(env["STUDIOML_HOME"], "experiments", env["STUDIOML_EXPERIMENT"], "modeldir") == Workspace(
        root=Path("/runs/abc.0")
    ).artifact("modeldir")
    assert env["OMP_NUM_THREADS"] == "7"
    assert env["OPENBLAS_NUM_THREADS"] == "3"
    assert env["AWS_SDK_LOAD_CONFIG"] == "1"
    assert env["PYTHONUNBUFFERED"] == "1"


@pytest.mark.parametrize(
    ("gpus", "seen"), [((), "-1"), (("GPU-a",), "GPU-a"), (("GPU-a", "GPU-b"), "GPU-a,GPU-b")]
)
def test_granted_gpus_are_visible_and_no_others_whatever_the_message_says(gpus, seen):
    asked = {
        "CUDA_VISIBLE_DEVICES": "0",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    }
    env = built(asked, gpus=gpus)
    assert env["CUDA_VISIBLE_DEVICES"] == env["NVIDIA_VISIBLE_DEVICES"] == seen
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
