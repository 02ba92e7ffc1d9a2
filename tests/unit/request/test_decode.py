from __future__ import annotations

import json
import math
from typing import Any

import pytest

from runner import errors
from runner.request.model import Artifact, Endpoint, KeyPair, Resources
from tests.unit.request.messages import CAPTURED, EXAMPLES, decode, decoded, example


def told(request, *words):
    return any(all(word in line for word in words) for line in request.warnings)


@pytest.mark.parametrize("path", [*CAPTURED, *EXAMPLES], ids=lambda path: path.stem)
def test_what_the_client_sends_is_read_without_a_warning(path):
    request = decode(path.read_bytes())
    assert request.warnings == ()
    assert request.raw == json.loads(path.read_bytes())
    assert request.artifact("workspace")
    assert request.filename


def test_there_are_messages_to_test():
    assert len(CAPTURED) == 6
    assert len(EXAMPLES) == 3


def test_example_a():
    request = decode(json.dumps(example("a")).encode())
    pair = KeyPair(access_key="AK", secret_key="SK", region="us-west-2")
    assert request.key == "1795307628_1143da05-beec-48c4-940c-e0e16010cf9d"
    assert (request.project, request.filename, request.python) == ("demo", "train.py", "3.11")
    assert request.args == ("--lr", "0.1", "two words")
    assert request.requirements == ("numpy==1.26.4", "-e git+https://github.com/x/y@abc#egg=y")
    assert request.extra_requirements == ()
    assert request.env == {"PATH": "%PATH%:./bin"}
    assert request.resources == Resources(
        cpus=2, ram_bytes=3 * 10**9, hdd_bytes=60 * 10**9, gpus=1, gpu_mem_bytes=4 * 10**9, gpu_count=1
    )
    assert [artifact.tag for artifact in request.artifacts] == [
        "modeldir",
        "output",
        "_metadata",
        "workspace",
        "pretrained",
    ]
    assert request.artifact("modeldir") == Artifact(
        tag="modeldir",
        key=f"experiments/{request.key}/modeldir.tar",
        qualified=f"s3://minio.lan:9000/art-bucket/experiments/{request.key}/modeldir.tar",
        bucket="art-bucket",
        mutable=True,
        unpack=True,
        credentials=pair,
        region="us-west-2",
    )
    assert request.artifact("pretrained").unpack is None
    assert request.artifact("pretrained").credentials is None
    assert request.storage == Endpoint(
        type="s3", endpoint="http://minio.lan:9000", bucket="art-bucket", region="us-west-2", credentials=pair
    )
    assert request.database.bucket == "meta-bucket"
    assert request.time_added == 1795307628.2142663
    assert (request.lifetime_secs, request.max_duration_secs, request.checkpoint_secs) == (
        7200.0,
        1200.0,
        60.0,
    )
    assert request.from_completion_service is True


def test_example_b_is_enough_to_run():
    request = decode(json.dumps(example("b")).encode())
    assert (request.python, request.project, request.args) == ("3", None, ())
    assert request.resources == Resources()
    assert request.time_added is request.lifetime_secs is request.max_duration_secs is request.storage is None
    assert request.checkpoint_secs == 60.0
    assert request.from_completion_service is False


def test_example_c():
    request = decode(json.dumps(example("c")).encode())
    assert request.artifact("dataset").url == "https://example.org/d.csv"
    assert request.artifact("prior").qualified is None
    assert (request.checkpoint_secs, request.lifetime_secs) == (180.0, 1800.0)
    assert request.resources == Resources(cpus=2, ram_bytes=3 * 10**9, hdd_bytes=10**10)


@pytest.mark.parametrize(
    ("wire", "python"),
    [(3, "3"), ("3", "3"), (3.6, "3.6"), ("3.6", "3.6"), (None, None), ("", None), (..., None), (3.0, "3"), (2, "2"),
     ("3.11.7", "3.11.7"), (" 3.11 ", "3.11"), ("python3.9", "3.9"), ("3.8.*", "3.8"), ("3.x", "3"), ("3.1", "3.1")],
)  # fmt: skip
def test_python_versions(wire, python):
    request = decoded({"pythonver": wire})
    assert request.python == python
    assert request.warnings == ()


def test_an_unquoted_3_10_arrives_as_3_1():
    request = decoded({"pythonver": 3.1})
    assert request.python == "3.10"
    assert told(request, "pythonver", "3.10")


@pytest.mark.parametrize("wire", [True, [], {"a": 1}, "three", "../3", -3])
def test_no_python_version_is_any_python(wire):
    request = decoded({"pythonver": wire})
    assert request.python is None
    assert told(request, "experiment.pythonver")


@pytest.mark.parametrize(
    ("wire", "argv"),
    [
        (["--a", "'two words'"], ("--a", "two words")),
        (["two words"], ("two", "words")),
        (["it's"], ("it's",)),
        (["'$HOME'", "$HOME"], ("$HOME", "$HOME")),
        (["''", ""], ("",)),
        (["'it'\"'\"'s'"], ("it's",)),
        ([1, 0.5, True, None], ("1", "0.5", "true")),
        ("--one 2", ("--one", "2")),
        (None, ()),
        (..., ()),
    ],
)
def test_args(wire, argv):
    assert decoded({"args": wire}).args == argv


def test_an_unbalanced_quote_is_told_and_kept():
    request = decoded({"args": ["it's"]})
    assert request.args == ("it's",)
    assert told(request, "experiment.args", "quotes")


@pytest.mark.parametrize("wire", [["a\0b"], ["x" * (3 << 20)]])
def test_args_that_no_program_can_be_given_are_refused(wire):
    with pytest.raises(errors.UnsupportedRequest, match="args"):
        decoded({"args": wire})


@pytest.mark.parametrize("wire", [1, "1", "1.0", 1.0, 0.5, " 1 "])
def test_counts_in_every_type(wire):
    request = decoded({"resources_needed": {"gpuCount": wire, "cpus": wire, "gpus": wire}})
    assert request.resources == Resources(gpu_count=1, cpus=1, gpus=1)
    assert request.warnings == ()


@pytest.mark.parametrize("wire", ["many", -1, "-1", True, [], {}, math.inf, math.nan, "nan", "1e999"])
def test_a_count_that_is_none_is_the_default_and_told(wire):
    request = decoded({"resources_needed": {"cpus": wire}})
    assert request.resources == Resources()
    assert told(request, "experiment.resources_needed.cpus is ignored")


@pytest.mark.parametrize(
    ("wire", "count"), [(0, 0), ("4gb", 4 * 10**9), (4096, 4096), ("2 GiB", 2**31), (None, 0), ("", 0)]
)
def test_sizes_in_every_type(wire, count):
    request = decoded({"resources_needed": {"gpuMem": wire, "ram": wire, "hdd": wire}})
    assert request.resources == Resources(gpu_mem_bytes=count, ram_bytes=count, hdd_bytes=count)
    assert request.warnings == ()


def test_a_size_that_is_none_is_the_default_and_told():
    request = decoded({"resources_needed": {"ram": "3 elephants", "hdd": "1g"}})
    assert request.resources == Resources(hdd_bytes=10**9)
    assert told(request, "experiment.resources_needed.ram", "3 elephants", "examples")


def test_the_experiments_resources_win_over_the_configurations():
    request = decoded(
        {"resources_needed": {"cpus": 4, "gpus": None}},
        {"resources_needed": {"cpus": 2, "gpus": 1, "ram": "1g"}},
    )
    assert request.resources == Resources(cpus=4, gpus=1, ram_bytes=10**9)


@pytest.mark.parametrize("wire", [None, {}, ..., "2 cpus", []])
def test_no_resources(wire):
    assert decoded({"resources_needed": wire}).resources == Resources()


def test_env_holds_scalars_as_the_configuration_file_said_them():
    request = decoded(
        config={
            "env": {"A": "x", "B": 3, "C": True, "D": False, "E": 0.5, "F": None, "G": [1], "H": {}, "I": ""}
        }
    )
    assert request.env == {"A": "x", "B": "3", "C": "true", "D": "false", "E": "0.5", "I": ""}
    assert told(request, "config.env.G", "a list")
    assert told(request, "config.env.H", "an object")
    assert not told(request, "config.env.F")


def test_env_names_and_values_that_cannot_be_are_dropped_without_showing_values():
    request = decoded(
        config={"env": {"A=B": "hush1", "": "hush2", "N\0L": "hush3", "V": "hush4\0", "OK": "1"}}
    )
    assert request.env == {"OK": "1"}
    assert len(request.warnings) == 4
    assert not told(request, "hush")


@pytest.mark.parametrize("wire", ["PATH=1", [], 3])
def test_an_env_that_is_no_object_is_told(wire):
    request = decoded(config={"env": wire})
    assert request.env == {}
    assert told(request, "config.env is ignored")


def test_requirement_lines():
    request = decoded({"pythonenv": [" a==1 ", "", "# comment", None, {"x": 1}, "b\nc"]}, {"pip": "d"})
    assert request.requirements == ("a==1", "b", "c")
    assert request.extra_requirements == ("d",)
    assert told(request, "experiment.pythonenv", "an object")
    assert decoded({"pythonenv": None}, {"pip": None}).requirements == ()


@pytest.mark.parametrize(
    ("wire", "secs"),
    [("1m", 60.0), (None, 60.0), (..., 60.0), ("soon", 60.0), ("1s", 10.0), ("0", 10.0), ("-1m", 10.0), ("20h", 43200.0), (90, 90.0), ("", 60.0)],
)  # fmt: skip
def test_checkpoint_interval(wire, secs):
    config = {} if wire is ... else {"saveWorkspaceFrequency": wire}
    request = decoded(config=config)
    assert request.checkpoint_secs == secs
    assert told(request, "config.saveWorkspaceFrequency") is (wire == "soon")


@pytest.mark.parametrize(
    ("wire", "secs"), [(300, 300.0), ("5m", 300.0), (1, 10.0), (0, None), (None, None), ("x", None)]
)
def test_an_artifacts_own_checkpoint_interval(wire, secs):
    request = decoded({"artifacts": {"m": {"mutable": True, "saveFrequency": wire}}})
    assert request.artifacts[0].save_frequency_secs == secs


@pytest.mark.parametrize(
    ("wire", "secs"),
    [("2h", 7200.0), ("-10m", -600.0), (None, None), ("", None), ("for ever", None), (30, 30.0), ([], None)],
)
def test_lifetime(wire, secs):
    request = decoded(config={"experimentLifetime": wire})
    assert request.lifetime_secs == secs
    assert told(request, "config.experimentLifetime") is (wire in ("for ever", []))


@pytest.mark.parametrize(
    ("wire", "secs"), [("1h30m", 5400.0), (None, None), ("", None), ("x", None), ("-10m", None), ("0", None)]
)
def test_max_duration(wire, secs):
    request = decoded({"max_duration": wire})
    assert request.max_duration_secs == secs
    assert told(request, "experiment.max_duration") is (wire in ("x", "-10m", "0"))


@pytest.mark.parametrize(
    ("wire", "at"),
    [
        (1.7e9, 1.7e9),
        ("1700000000", 1.7e9),
        (None, None),
        (0, None),
        (10, None),
        (math.nan, None),
        ("x", None),
        ([], None),
    ],
)
def test_time_added(wire, at):
    assert decoded({"time_added": wire}).time_added == at


def test_sent_is_the_last_time_that_the_client_wrote_down():
    assert decoded({"time_added": 1.7e9, "time_last_checkpoint": 1.7e9 + 5}).sent == 1.7e9 + 5
    assert decoded({"time_added": 1.7e9, "time_last_checkpoint": "late"}).sent == 1.7e9
    assert decoded({}).sent is None


@pytest.mark.parametrize("wire", [True, False, None, "no", 0])
def test_the_mere_presence_of_from_compl_service_counts(wire):
    assert decoded({"from_compl_service": wire}).from_completion_service is True
    assert decoded().from_completion_service is False


@pytest.mark.parametrize(
    ("wire", "flag"), [(True, True), (None, False), ("true", True), ("False", False), (1, True), ([], False)]
)
def test_mutable(wire, flag):
    assert decoded({"artifacts": {"a": {"mutable": wire}}}).artifacts[0].mutable is flag


@pytest.mark.parametrize(
    ("wire", "flag"), [(True, True), (False, False), (None, None), ("true", True), (0, False), ("tar", None)]
)
def test_unpack(wire, flag):
    assert decoded({"artifacts": {"a": {"unpack": wire}}}).artifacts[0].unpack is flag


@pytest.mark.parametrize(
    "tag",
    ["..", ".", "", "a/b", "/etc", "../x", "a\0", "-rf", "_runner", "x" * 201, "é" * 101, "a\nb", "\x7f"],
)
def test_tags_that_cannot_name_a_directory_are_refused(tag):
    with pytest.raises(errors.UnsupportedRequest, match="artifact tag"):
        decoded({"artifacts": {tag: {"key": "k"}}})


@pytest.mark.parametrize(
    "tag", ["workspace", "_metadata", "x" * 200, "with blank", "...", ".hidden", "é", "C:\\x"]
)
def test_other_tags_are_fine(tag):
    assert decoded({"artifacts": {tag: {"key": "k"}}}).artifacts[0].tag == tag


@pytest.mark.parametrize("name", ["key", "qualified", "url", "bucket"])
def test_an_address_with_a_nul_is_refused(name):
    with pytest.raises(errors.UnsupportedRequest, match=f"experiment.artifacts.a.{name} holds a NUL"):
        decoded({"artifacts": {"a": {name: "s3://h/b/k\0"}}})


def test_a_null_artifact_is_none_and_another_type_is_malformed():
    request = decoded({"artifacts": {"a": None}})
    assert request.artifacts == ()
    assert told(request, "experiment.artifacts.a is null")
    others: list[Any] = ["s3://x", [], 3]
    for wire in others:
        with pytest.raises(errors.MalformedMessage, match=r"experiment.artifacts.a is .*, not an object"):
            decoded({"artifacts": {"a": wire}})
    with pytest.raises(errors.MalformedMessage, match=r"experiment\.artifacts is a list"):
        decoded({"artifacts": []})


def test_nothing_to_run():
    nothings: list[Any] = [None, "", ..., [], {}]
    for wire in nothings:
        with pytest.raises(errors.UnsupportedRequest, match="nothing to run"):
            decoded({"filename": wire, "artifacts": {"workspace": {"key": "k"}}})
    assert (
        decoded({"filename": None, "artifacts": {"_singularity": {"qualified": "shub://x/y"}}}).filename
        is None
    )
    assert decoded({"filename": "-m"}).artifacts == ()


def test_odd_unused_members_do_no_harm():
    odd: dict[str, Any] = {
        "info": None,
        "git": 3,
        "metric": [],
        "status": {},
        "owner": None,
        "time_started": "x",
        "brand_new": [{}],
    }
    request = decoded(
        odd, {"cloud": 3, "verbose": 7, "runner": [], "optimizer": None, "brand_new": {"x": [1]}}
    )
    assert request.warnings == ()


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_config_may_be_missing_or_odd(config):
    request = decoded(config=config)
    assert request.key == "k1"
    assert told(request, "config is ignored") is (config is not None)


@pytest.mark.parametrize("wire", [..., None, "", "  ", {}, [], "x" * 2000])
def test_a_key_is_needed(wire):
    with pytest.raises(errors.MalformedMessage, match=r"experiment\.key"):
        decoded({"key": wire})


def test_a_key_may_be_a_number_and_is_opaque():
    assert decoded({"key": 17}).key == "17"
    assert decoded({"key": "../../etc"}).key == "../../etc"


def test_member_names_match_in_any_case_and_the_exact_one_wins():
    body = b'{"Experiment": {"KEY": "k", "FileName": "f.py", "Resources_Needed": {"GPUMEM": "1g"}}, "CONFIG": {"ENV": {"a": "b"}}}'
    request = decode(body)
    assert (request.key, request.filename, request.env) == ("k", "f.py", {"a": "b"})
    assert request.resources.gpu_mem_bytes == 10**9
    assert decoded({"KEY": "other"}).key == "k1"


def test_a_repr_of_a_request_shows_no_secrets():
    request = decoded(
        {
            "artifacts": {
                "a": {
                    "credentials": {
                        "aws": {"access_key": "AK", "secret_access_key": "hush", "session_token": "hush"}
                    }
                }
            }
        }
    )
    assert "hush" not in repr(request)


def test_there_is_an_end_to_warnings():
    assert len(decoded(config={"env": {str(number): [] for number in range(1000)}}).warnings) == 50
