"""`make bench` works: its short form gives figures. What they are is not for a test to say."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.service
def test_the_short_bench_gives_figures_beside_their_baselines(tmp_path, rabbitmq, seaweedfs):
    """The servers are asked for so that the test is skipped where they are missing; the bench starts its own."""
    parts = ["--only=latency", "--only=scrape", "--only=archive"]
    argv = [sys.executable, "-m", "bench", "--quick", "--archive-size=4MiB", f"--results={tmp_path}", *parts]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert ran.returncode == 0, ran.stderr
    (kept,) = tmp_path.glob("*.json")
    figures = {figure["name"]: figure for figure in json.loads(kept.read_bytes())["figures"]}
    assert len(figures) == 5
    for name in ("publish to first line, p50", "4.19 MB archive from S3, unpacked"):
        assert figures[name]["value"] > 0
        assert figures[name]["baseline"] > 0
        assert figures[name]["ratio"] == pytest.approx(figures[name]["value"] / figures[name]["baseline"])
    assert figures["scrape"]["kept"] in {True, False}
    assert "publish to first line" in ran.stdout
