"""Start the program, also as `python cmd/runner`."""

from __future__ import annotations

from runner.cli.main import main

raise SystemExit(main())
