from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runner
from runner import config, errors
from runner.cli import main, serve

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    for name in ("LOGXI", "LOGXI_FORMAT", "QUEUE_MATCH", "AMQP_URL", "DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(main, "_spare_rich", lambda: None)


@pytest.fixture
def served(monkeypatch):
    seen: list[config.Config] = []

    def remember(options):
        seen.append(options)
        return 0

    monkeypatch.setattr(serve, "serve", remember)
    return seen


@pytest.mark.parametrize(
    "argv",
    [
        ["/usr/bin/runner"],
        ["cmd/runner"],
        ["/somewhere/runner/__main__.py"],
        ["/usr/bin/studio-runner", "serve"],
        ["cmd/studio_runner", "serve"],
        ["runner", "serve"],
    ],
)
def test_the_daemon_starts_under_all_its_names(argv, served):
    assert main.main([*argv, "-max-cores", "3", "--debug"]) == 0
    assert (served[0].machine.max_cores, served[0].paths.keep_runs) == (3, True)


def test_relative_paths_start_from_here(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main.main(["runner", "--working-dir=w"])
    assert served[0].paths.working_dir == tmp_path / "w"


@pytest.mark.parametrize(
    "argv", [["runner", "--help"], ["studio-runner", "serve", "-h"], ["runner", "--debug", "-help"]]
)
def test_help_of_the_daemon(argv, capsys):
    assert main.main(argv) == 0
    assert "--queue-match" in capsys.readouterr().out


def test_without_a_verb_the_verbs_are_shown(capsys):
    main.main(["studio-runner"])
    shown = capsys.readouterr()
    assert all(verb in shown.out + shown.err for verb in ("serve", *main.VERBS))


@pytest.mark.parametrize("words", [[], ["submit"], ["explain"], ["doctor"], ["dlq", "list"], ["dlq", "drop"]])
def test_flags_look_as_if_they_took_no_value(words, capsys):
    main.main(["studio-runner", *words, "--help"])
    shown = [line for line in capsys.readouterr().out.splitlines() if "<bool>" in line]
    assert not [line for line in shown if "--help" not in line]  # that one is typer's own


def test_versions(capsys):
    assert main.main(["studio-runner", "--version"]) == 0
    assert main.main(["runner", "version"]) == 0
    assert capsys.readouterr().out.count(f"studio-runner {runner.__version__}") == 2


def test_an_unknown_verb_is_wrong_usage(capsys):
    assert main.main(["studio-runner", "frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


def test_a_wrong_option_is_one_line_on_stderr_and_exit_code_2(capsys):
    assert main.main(["runner", "--queue-match=["]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("runner: --queue-match=[: not a regular expression")


def test_a_wrong_variable_too(capsys, monkeypatch):
    monkeypatch.setenv("QUEUE_MATCH", "[")
    assert main.main(["studio-runner", "serve"]) == 2
    assert capsys.readouterr().err.startswith("studio-runner: QUEUE_MATCH=[: ")


def test_errors_have_the_exit_code_of_their_class(capsys, monkeypatch):
    def fail(_options):
        raise errors.QueueUnavailable("no broker")

    monkeypatch.setattr(serve, "serve", fail)
    assert main.main(["runner"]) == 1
    assert capsys.readouterr().err == "runner: no broker\n"


def test_an_interrupt_is_130(monkeypatch):
    def interrupt(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serve", interrupt)
    assert main.main(["runner"]) == main.EXIT_INTERRUPTED


def test_a_working_directory_that_cannot_be_made_is_called_by_its_option(tmp_path):
    (tmp_path / "file").touch()
    given = tmp_path / "file" / "work"
    with pytest.raises(errors.UsageError, match=rf"^--working-dir={given}: .*Not a directory$"):
        asyncio.run(serve.run_daemon(config.parse([f"--working-dir={given}"], {})))


def pem(tmp_path, text):
    path = tmp_path / "x.pem"
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        (b"hello", "no PEM data"),
        (b"-----BEGIN CERTIFICATE-----" + b"a" * serve.MAX_CA_BYTES, "larger than 128 KiB"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, text, why):
    path = tmp_path / "none.pem" if text is None else pem(tmp_path, text)
    with pytest.raises(errors.UsageError, match=rf"^--s3-ca={path}: .*{why}"):
        serve.check_files(config.parse([f"--s3-ca={path}"], {}))


def test_files_that_can_be_used_are_not(tmp_path):
    path = pem(tmp_path, b"comment\n-----BEGIN CERTIFICATE-----\n")
    serve.check_files(config.parse([f"--s3-ca={path}", f"--s3-cert={path}", f"--s3-key={path}"], {}))
    serve.check_files(config.parse([], {}))


def test_the_daemon_pays_neither_for_typer_nor_for_rich():
    code = (
        "import sys; from runner.cli import main; main._spare_rich(); from runner.cli import serve; "
        "serve.serve = lambda options: print(sorted({name.split('.')[0] for name in sys.modules})) or 0; "
        "raise SystemExit(main.main(['runner', '--debug']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'structlog'" in done.stdout
    assert not {"typer", "rich", "click"} & set(eval(done.stdout))


def test_python_m_runner_is_the_daemon():
    environ = {"PATH": os.environ["PATH"], "QUEUE_MATCH": "["}
    done = subprocess.run(
        [sys.executable, "-m", "runner"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("runner: QUEUE_MATCH=[: not a regular expression")
