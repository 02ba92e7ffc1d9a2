from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import errors
from runner.executors.requirements import Requirements, normalise, redacted

CAPTURED = Path(__file__).parents[2] / "data" / "captured"


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


def read(workspace, *lines, extra=(), gpus=False) -> Requirements:
    return normalise(lines, extra, workspace=workspace, gpus=gpus)


def texts(found: Requirements) -> list[str]:
    return [line.text for line in found.lines]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("six==1.16.0", ["six==1.16.0"]),
        ("  six == 1.16.0   # for tests", ["six==1.16.0"]),
        ("", []),
        ("# Editable install with no version control (n==1.0)", []),
        ("requests[security]>=2,<3", ["requests[security]<3,>=2"]),
        ('numpy==1.19 ; python_version < "3.8"', ['numpy==1.19; python_version < "3.8"']),
        ("six", ["six"]),
        ("numpy scipy", ["numpy", "scipy"]),
        ("--upgrade six", ["six"]),
        ("pkg-resources==0.0.0", []),
        ("pkg_resources==0.0.0", []),
        ("numpy=1.21.5=py38h6c91a56_3", ["numpy==1.21.5"]),
        ("numpy=1.21", ["numpy==1.21"]),
        ("certifi @ file:///croot/certifi_1671487769961/work/certifi", ["certifi"]),
        ("six @ file:///home/u/wheels/six-1.16.0-py2.py3-none-any.whl", ["six==1.16.0"]),
        ("file:///home/u/six-1.16.0.tar.gz", ["six==1.16.0"]),
        ("./gone/six-1.16.0.tar.gz", ["six==1.16.0"]),
        (
            "-e git+https://host/o/n.git@0123456789abcdef#egg=n",
            ["n @ git+https://host/o/n.git@0123456789abcdef"],
        ),
        (
            "git+https://host/o/n.git@v1#egg=n[x]&subdirectory=s",
            ["n[x] @ git+https://host/o/n.git@v1#subdirectory=s"],
        ),
        ("--editable=git+https://host/o/n.git#egg=n", ["n @ git+https://host/o/n.git"]),
        ("git+https://host/o/n.git", ["git+https://host/o/n.git"]),
        ("-e git+git@host:o/n.git@0123456789#egg=n", ["n @ git+ssh://git@host/o/n.git@0123456789"]),
        (
            "n @ git+https://host/o/n.git@v1 ; python_version > '3'",
            ['n @ git+https://host/o/n.git@v1 ; python_version > "3"'],
        ),
        ("https://host/x/n-1.0-py3-none-any.whl", ["https://host/x/n-1.0-py3-none-any.whl"]),
        ("n[x] @ ../other", ["n[x]"]),
        ("n @ svn+https://host/n", ["n"]),
        ("-e /home/u/project", []),
        ("six==1.16.0 --hash=sha256:00", ["six==1.16.0 --hash=sha256:00"]),
        ("six==1.16.0 \\", ["six==1.16.0"]),
        ("--trusted-host pypi.example six", ["six"]),
    ],
)
def test_a_line_becomes_what_uv_takes(workspace, line, expected):
    assert texts(read(workspace, line)) == expected


@pytest.mark.parametrize(
    "line",
    [
        "six>=",
        "six==1.0-custom!",
        "-e .",
        "./pkg",
        "file:///home/u/pkg",
        "-r gone.txt",
        "six==${SECRET}",
        "n @",
    ],
)
def test_a_line_that_nobody_understands_is_refused_and_named(workspace, line):
    (workspace.parent / "pkg").mkdir()
    if line == "-e .":
        line = "-e ../pkg"
    with pytest.raises(errors.UnsupportedRequest) as caught:
        read(workspace, "six", line)
    assert line in str(caught.value)


def test_what_is_replaced_or_left_out_is_said(workspace):
    found = read(
        workspace, "certifi @ file:///croot/certifi/work", "-e /home/u/p", "-c limits.txt six", "a=1.0"
    )
    assert len(found.warnings) == 4
    assert texts(found) == ["certifi", "six", "a==1.0"]


def test_secrets_of_urls_are_in_no_warning_and_no_error(workspace):
    found = read(workspace, "n @ hg+https://user:canary@host/n", "--find-links ftp://u:canary@host/x")
    assert found.warnings
    assert "canary" not in str(found.warnings)
    with pytest.raises(errors.UnsupportedRequest) as caught:
        read(workspace, "hg+https://user:canary@host/n")
    assert "canary" not in str(caught.value)
    assert redacted("x https://u:p@h/ y") == "x https://***@h/ y"


def test_index_options_are_kept(workspace):
    found = read(
        workspace,
        "-i https://a/simple",
        "--extra-index-url=https://u:p@b:8/simple",
        "-f https://c/x",
        "--pre",
    )
    assert found.options == (
        "--index-url https://a/simple",
        "--extra-index-url https://u:p@b:8/simple",
        "--find-links https://c/x",
    )
    assert found.prereleases
    assert found.hosts == {"a", "b", "c"}


def test_a_find_links_directory_must_be_in_the_workspace(workspace):
    (workspace / "wheels").mkdir()
    found = read(workspace, "-f wheels", "-f /etc", "-f ../")
    assert found.options == (f"--find-links {workspace / 'wheels'}",)
    assert len(found.warnings) == 2


@pytest.mark.parametrize(
    ("lines", "extra", "expected"),
    [
        (["a==1", "a==1"], [], ["a==1"]),
        (["a==1", "b", "A==2"], [], ["b", "A==2"]),
        (["a==1"], ["a==2"], ["a==2"]),
        (["a==1"], ["a>=2"], ["a>=2"]),
        (["a==1"], ["a"], ["a==1", "a"]),
        (["a>=1", "a<3"], [], ["a>=1", "a<3"]),
        (["a==1", "a @ https://h/a-2.tar.gz"], [], ["a @ https://h/a-2.tar.gz"]),
        (
            ["a==1; python_version<'3'", "a==2; python_version>='3'"],
            [],
            ['a==1; python_version < "3"', 'a==2; python_version >= "3"'],
        ),
        (["a==1", "a[x]==1"], [], ["a==1", "a[x]==1"]),
    ],
)
def test_the_later_of_two_that_contradict_wins(workspace, lines, extra, expected):
    found = read(workspace, *lines, extra=extra)
    assert texts(found) == expected
    assert bool(found.warnings) == (len(expected) < len({*lines, *extra}))


@pytest.mark.parametrize(
    ("line", "with_cards", "without"),
    [
        ("tensorflow==1.15.0", "tensorflow-gpu==1.15.0", "tensorflow==1.15.0"),
        ("tensorflow-gpu==2.4.1", "tensorflow-gpu==2.4.1", "tensorflow==2.4.1"),
        ("tensorflow_gpu==2.12.0", "tensorflow==2.12.0", "tensorflow==2.12.0"),
        ("tensorflow>=2", "tensorflow>=2", "tensorflow>=2"),
        ("tensorflow-estimator==1.15.0", "tensorflow-estimator==1.15.0", "tensorflow-estimator==1.15.0"),
    ],
)
def test_tensorflow_follows_the_cards(workspace, line, with_cards, without):
    assert texts(read(workspace, line, gpus=True)) == [with_cards]
    assert texts(read(workspace, line, gpus=False)) == [without]


@pytest.mark.parametrize(
    ("lines", "pinned"),
    [
        ([], True),
        (["a==1", "b===2"], True),
        (["a==1.*"], False),
        (["a==1", "b"], False),
        (["a>=1,<2"], False),
        (["n @ git+https://h/n@0123456789abcdef0123456789abcdef01234567"], True),
        (["n @ git+https://h/n@main"], False),
        (["n @ https://h/n-1.0.tar.gz"], True),
        (["n @ https://h/archive/main.zip"], False),
    ],
)
def test_pins_are_told_from_what_changes(workspace, lines, pinned):
    assert read(workspace, *lines).pinned is pinned


def test_the_workspaces_own_studioml_replaces_the_one_asked_for(workspace):
    dist = workspace / "dist"
    dist.mkdir()
    for number, version in enumerate(["0.0.9", "0.0.10"]):
        file = dist / f"studioml-{version}.tar.gz"
        file.write_bytes(version.encode())
        __import__("os").utime(file, (1000 - number, 1000 - number))
    found = read(workspace, "studioml==0.0.49", "studioml @ git+https://h/s#egg=studioml", "six==1")
    assert texts(found) == [f"studioml @ file://{dist}/studioml-0.0.9.tar.gz", "six==1"]
    assert found.pinned
    assert texts(read(workspace.parent, "studioml==0.0.49")) == ["studioml==0.0.49"]


def test_a_local_package_is_known_by_its_content_not_its_place(tmp_path):
    identities = []
    for run, content in [("one", "1"), ("two", "1"), ("three", "2")]:
        package = tmp_path / run / "pkg"
        package.mkdir(parents=True)
        (package / "setup.py").write_text(content)
        found = read(tmp_path / run, "-e ./pkg")
        assert texts(found) == [str(package)]
        assert str(tmp_path) not in found.lines[0].identity
        identities.append(found.lines[0].identity)
    assert identities[0] == identities[1] != identities[2]


def test_a_link_out_of_the_workspace_is_not_followed(workspace):
    (workspace / "pkg").symlink_to("/usr")
    with pytest.raises(errors.UnsupportedRequest):
        read(workspace, "./pkg")


def test_a_requirements_file_of_the_workspace_is_read(workspace):
    (workspace / "r.txt").write_text("a==1\n-r s.txt\n")
    (workspace / "s.txt").write_text("b==2\n")
    assert texts(read(workspace, "-r r.txt")) == ["a==1", "b==2"]
    (workspace / "s.txt").write_text("-r r.txt\n")
    with pytest.raises(errors.UnsupportedRequest):
        read(workspace, "-r r.txt")


def test_two_lines_in_one_are_two(workspace):
    assert texts(read(workspace, "a==1\n--index-url file:///etc\nb==2")) == ["a==1", "b==2"]


def test_what_the_client_really_sends_is_kept_whole(workspace):
    lines = json.loads((CAPTURED / "plain.json").read_text())["experiment"]["pythonenv"]
    found = read(workspace, *lines)
    assert texts(found) == lines
    assert found.pinned
    assert not found.warnings


@given(
    lines=st.lists(
        st.text(max_size=60) | st.from_regex(r"(-e |-i |n @ )?(git\+)?\w*://[\[\]@:/#=\w]*", fullmatch=True)
    )
)
def test_any_text_gives_lines_or_a_refusal(lines):
    workspace = Path("/nonexistent-workspace")
    try:
        found = normalise(lines, (), workspace=workspace, gpus=True)
    except errors.UnsupportedRequest:
        return
    assert all("\n" not in line.text for line in found.lines)
    assert found.hosts is not None
