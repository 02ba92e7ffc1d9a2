"""`python -m runner` is the command line."""

from __future__ import annotations

from runner.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
