"""`studio-runner doctor` against a real broker, a real S3 server and real directories."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest

from runner.cli.main import main
from tests.servers import nvml
from tests.servers.daemon import PROGRAM, clean_environment
from tests.servers.seaweedfs import ADMIN

pytestmark = pytest.mark.service


def doctor(root: pathlib.Path, *arguments: str, **env: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Its exit code, and its findings by subject."""
    command = [str(PROGRAM), "doctor", "--json", f"--working-dir={root / 'work'}", *arguments]
    ended = subprocess.run(
        command, env=clean_environment() | env, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode in {0, 1}, ended.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(ended.stdout):
        found.setdefault(finding["subject"], []).append(finding)
    return ended.returncode, found


def verdicts(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["verdict"] for finding in findings]


def test_a_machine_with_nothing_configured_is_well(tmp_path):
    (tmp_path / "work" / "queue" / "local_a").mkdir(parents=True)
    code, found = doctor(tmp_path)
    assert code == 0, found
    (account,) = found["account local"]
    assert (account["verdict"], account["facts"]["taken"]) == ("ok", 1)
    assert found["machine"][0]["facts"]["cores"] >= 1
    (python,) = found["python"]
    assert any(one["path"].startswith("/") for one in python["facts"]["interpreters"])


def test_a_broker_and_what_is_wrong_with_how_it_is_used(tmp_path, rabbitmq):
    rabbitmq.declare("rmq_doctor")
    code, found = doctor(tmp_path, f"--amqp-mgt-url={rabbitmq.management_url}", AMQP_URL=rabbitmq.amqp_url)
    (told, guest) = (
        finding for subject, each in found.items() if subject.startswith("account") for finding in each
    )
    assert code == 0
    assert told["verdict"] == "ok"
    assert told["facts"]["taken"] >= 1
    assert guest["verdict"] == "warning"
    assert "guest" in guest["text"]
    assert "add_user" in guest["advice"]


def test_accounts_of_a_directory_one_broken_one_away(tmp_path, rabbitmq):
    certs = tmp_path / "certs"
    certs.mkdir()
    (certs / "good").write_text(f"url: {rabbitmq.amqp_url}\nmanagement_url: {rabbitmq.management_url}\n")
    (certs / "broken.json").write_text("{}")
    (certs / "away").write_text("amqp://user:hidden-secret@127.0.0.1:1")
    code, found = doctor(tmp_path, f"--certs-dir={certs}", "--queue-match=^none_of_them$")
    assert code == 1
    assert verdicts(found["account broken.json"]) == ["problem"]
    assert verdicts(found["account away"]) == ["problem"]
    assert verdicts(found["account good"])[0] == "warning"  # it answers, and no queue of it is taken
    assert "hidden-secret" not in json.dumps(found)


def test_stores(tmp_path, seaweedfs):
    bucket = seaweedfs.make_bucket("doctor")
    base = f"http://{seaweedfs.endpoint}"
    code, found = doctor(
        tmp_path,
        *[f"--store={base}/{bucket}", f"--store={base}/no-such-bucket", "--store=http://127.0.0.1:1/bucket"],
        AWS_ACCESS_KEY_ID=ADMIN.access_key,
        AWS_SECRET_ACCESS_KEY=ADMIN.secret_key,
    )
    assert code == 1
    told = {
        subject: finding["verdict"] for subject, (finding, *_) in found.items() if subject.startswith("store")
    }
    assert list(told.values()) == ["ok", "problem", "problem"], found
    code, found = doctor(
        tmp_path,
        f"--store={base}/{bucket}",
        AWS_ACCESS_KEY_ID="stranger",
        AWS_SECRET_ACCESS_KEY="wrong-secret",
    )
    ((refused,),) = (findings for subject, findings in found.items() if subject.startswith("store"))
    assert (code, refused["verdict"]) == (1, "problem")
    assert "AWS_ACCESS_KEY_ID" in refused["advice"]
    assert "wrong-secret" not in json.dumps(found)


def test_the_metadata_store_is_one_too(tmp_path):
    (tmp_path / "manifests").mkdir()
    for where, verdict in (
        (f"file://{tmp_path}/manifests", "ok"),
        ("s3://127.0.0.1:1/bucket/prefix", "problem"),
        ("gs://bucket/prefix", "problem"),
    ):
        code, found = doctor(tmp_path, f"--metadata-store={where}")
        (finding,) = (each for subject, (each,) in found.items() if subject.startswith("--metadata-store"))
        assert (finding["verdict"], code) == (verdict, int(verdict == "problem")), finding


def test_another_user_for_experiments_must_reach_the_interpreters(tmp_path):
    _, found = doctor(tmp_path, "--run-as=no-such-user")
    assert verdicts(found["--run-as"]) == ["problem"]
    if os.geteuid():
        return
    (told,) = doctor(tmp_path, "--run-as=54321")[1]["--run-as"]
    (python,) = found["python"]
    interpreters = [
        one["path"] for one in python["facts"]["interpreters"] if not one["version"].startswith("2.")
    ]
    reached = [
        path
        for path in interpreters
        if all(above.stat().st_mode & 0o001 for above in pathlib.Path(path).parents)
    ]
    assert told["verdict"] == ("ok" if reached == interpreters else "warning" if reached else "problem"), told
    assert set(told["facts"].get("unreachable", [])) == set(interpreters) - set(reached)


def test_options_are_those_of_the_daemon(capsys):
    assert main(["studio-runner", "doctor", "--max-coress=3"]) == 2
    assert "--max-cores" in capsys.readouterr().err


def test_more_than_the_machine_has_is_a_problem(tmp_path):
    code, found = doctor(tmp_path, "-max-cores", "100000")
    assert code == 1
    assert verdicts(found["machine"]) == ["problem"]


def test_a_directory_of_somebody_else(tmp_path):
    code, found = doctor(tmp_path, "--state-dir=/proc/studio-runner")
    assert code == 1
    assert verdicts(found["--state-dir"]) == ["problem"]


def test_lines_for_people(tmp_path):
    command = [str(PROGRAM), "doctor", f"--working-dir={tmp_path / 'work'}", f"--store={tmp_path / 'none'}"]
    ended = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=100, check=False
    )
    lines = ended.stdout.splitlines()
    assert any(line.startswith(f"ok: --working-dir: {tmp_path}/work: ") for line in lines)
    assert lines[-1].startswith("problems: ")
    assert not any(line.endswith(" ") for line in lines)


def test_cards_as_the_runner_would_use_them(tmp_path, nvml_library):
    fake = nvml.Machine(tmp_path / "machine")
    fake.gpus = [
        nvml.T4(uuid="GPU-a"),
        nvml.A100_40(uuid="GPU-b", ecc=3),
        nvml.Gpu(uuid="GPU-c", name="Something New", total=24 * nvml.GIB),
        nvml.T4(uuid="GPU-d"),
    ]
    fake.write()
    seen = nvml.environment(nvml_library, fake) | {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    code, found = doctor(tmp_path, **seen)
    assert code == 1
    cards = {subject: finding for subject, (finding,) in found.items() if subject.startswith("gpu")}
    assert {subject: finding["verdict"] for subject, finding in cards.items()} == {
        "gpu 0": "ok",
        "gpu 1": "problem",
        "gpu 2": "warning",
        "gpu 3": "ok",
    }
    assert "Tesla T4" in cards["gpu 0"]["text"]
    assert "fenced" in cards["gpu 1"]["text"]
    assert "--gpu-cards" in cards["gpu 2"]["advice"]
    assert "CUDA_VISIBLE_DEVICES" in cards["gpu 3"]["text"]
    _, found = doctor(tmp_path, "--cpu-only", **seen)
    assert verdicts(found["gpus"]) == ["ok"]


def test_engines_of_containers(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    engine = programs / "docker"
    engine.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon at unix:///x.' >&2; exit 1\n")
    engine.chmod(0o755)
    (programs / "apptainer").symlink_to("/bin/true")
    path = {"PATH": str(programs)}
    code, found = doctor(tmp_path, **path)
    assert (code, verdicts(found["containers"]), verdicts(found["singularity"])) == (0, ["warning"], ["ok"])
    assert "Cannot connect" in found["containers"][0]["text"]
    code, found = doctor(tmp_path, "--container-engine=docker", **path)
    assert (code, verdicts(found["containers"])) == (1, ["problem"])
    _, found = doctor(tmp_path, "--container-engine=off", **path)
    assert verdicts(found["containers"]) == ["ok"]


def test_how_limits_are_seen_to_is_told(tmp_path):
    _, found = doctor(tmp_path)
    assert found["limits"][0]["facts"]["mechanism"] in {"measured", "cgroup v1", "cgroup v2"}
    _, found = doctor(tmp_path, "--enforce-limits=false")
    assert verdicts(found["limits"]) == ["warning"]
