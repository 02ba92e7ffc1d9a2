from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.cli import options
from runner.options import OPTIONS, VARIABLES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text() == options.document(), (
        "write it anew: python -m runner.cli.options > docs/configuration.md"
    )


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_is_on_the_page_with_its_variable_and_default(option):
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `--{option.name}` |")]
    if option.env:
        assert f"`{option.env}`" in line
    assert (option.default_text or option.default).replace("|", "\\|") in line


def test_variables_that_are_no_options_are_there_too():
    assert all(f"| `{name}` |" in PAGE.read_text() for name, _ in VARIABLES)


def test_the_help_shows_every_option_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    options.print_help("studio-runner serve")
    shown = capsys.readouterr().out
    assert shown.count("\n") < 200
    bare = re.sub(r"[\s│]", "", shown)  # however the lines are folded
    for option in OPTIONS:
        assert f"--{option.name} " in shown
        assert option.is_flag or option.kind.metavar in shown
        assert option.help.replace(" ", "") in bare
        assert option.missing or option.default.replace(" ", "") in bare or option.default_text
