"""`python -m bench`: measures what the runner must cost (DESIGN.md 7), prints a table, keeps it as JSON in bench/results."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import subprocess
import sys
import time

from bench import figures
from bench.lab import Lab
from runner import units

#: Part -> what it needs is started by itself. In this order.
PARTS = (
    "latency",
    "throughput",
    "environment",
    "archive",
    "scrape",
    "sampling",
    "memory",
    "idle",
    "discovery",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 0 whatever they measure, 1 when one could not."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="measure only this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="short: shows that it works, figures are coarse")
    parser.add_argument("--archive-size", default=None, help="of the S3 archive (default 1GiB, quick 64MiB)")
    parser.add_argument(
        "--output-size", default=None, help="that a workload prints (default 1GB, quick 50MB)"
    )
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    lab = Lab(
        quick=options.quick,
        archive_bytes=units.parse_bytes(options.archive_size or ("64MiB" if options.quick else "1GiB")),
        output_bytes=units.parse_bytes(options.output_size or ("50MB" if options.quick else "1GB")),
    )
    measured: list[figures.Figure] = []
    failed: list[str] = []
    with contextlib.closing(lab):
        for part in options.only or PARTS:
            print(f"{part} ...", file=sys.stderr, flush=True)
            try:
                measured += importlib.import_module(f"bench.{part}").measure(lab)
            except (
                AssertionError,
                OSError,
                subprocess.SubprocessError,
            ) as exc:  # the others are still worth it
                print(f"{part} failed: {exc}", file=sys.stderr)
                failed.append(part)
    figures.show(measured)
    told = {"only": options.only, "quick": options.quick, "failed": failed}
    content = figures.document(measured, options=told, secs=time.monotonic() - began)
    path = figures.save(options.results, time.strftime("%Y%m%dT%H%M%S"), content)
    print(f"load {' '.join(map(str, content['machine']['load']))}; kept in {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
