"""What a submission looks like on a terminal: the demo, and `submit --wait`."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from rich.console import Console

from runner.cli.live import Live
from runner.client.follow import End, Metric, Output, Stage
from runner.client.views import Ending

if TYPE_CHECKING:
    from runner.client.follow import Event

COMPLETED = Ending(status="completed", reason="exit", text="completed", exit_code=0)
FAILED = Ending(status="failed", reason="timeout", text="it ran for its max_duration of 3 s", exit_code=None)


def shown(*events: Event) -> str:
    file = io.StringIO()
    with Live(Console(file=file, force_terminal=True, color_system="standard", width=80)) as live:
        for event in events:
            live.event(event)
    return file.getvalue()


def test_stages_output_metrics_and_the_end_are_shown():
    told = shown(
        Stage(stage="queued", note="no core is free"),
        Stage(stage="running"),
        Output(data=b"epoch 1\nepo"),
        Output(data=b"ch 2\nno newline"),
        Metric(latest={"loss": 0.25, "name": "digits", "all": [1]}, values={}),
        End(ending=COMPLETED),
    )
    for text in ("waiting for a runner: no core is free", "epoch 1\n", "epoch 2\n", "no newline\n"):
        assert text in told
    assert re.search(r"✔ completed.*\n.*loss 0.25  name digits\S*\n", told)
    assert "✘ the runner ended it: failed (timeout): it ran" in shown(End(ending=FAILED))


def test_the_live_line_tells_the_stage_the_time_and_the_last_metric():
    file = io.StringIO()
    with Live(Console(file=io.StringIO(), force_terminal=True)) as live:
        live.event(Stage(stage="running", attempt=2))
        live.event(Output(data=b"10 %\r20 %"))
        live.event(Metric(latest={"loss": 0.5}, values={}))
        Console(file=file, width=80).print(live._render())
    assert re.search(r"\n.* attempt 2: running  \d+\.\d s  loss 0\.5\s*$", file.getvalue())
    assert file.getvalue().startswith("20 %")


def test_what_a_workload_prints_cannot_steer_the_terminal():
    nasty = (
        "\x1b[31mred\x1b[0m \x1bc \x0e \x9b2J \x1b[2J \x1b]0;title\x07 \x1b]52;c;eA==\x1b\\ \x7f cut \x1b["
    )
    told = shown(Output(data=f"{nasty}\nnext\n".encode()), End(ending=COMPLETED))
    assert "\x1b[31mred" in told
    assert "next\n" in told
    for steering in ("\x1bc", "\x0e", "\x9b", "\x1b[2J", "\x1b]", "\x07", "\x7f", "\x1b[\n"):
        assert steering not in told, repr(steering)
