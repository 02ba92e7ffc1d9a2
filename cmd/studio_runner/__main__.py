"""Start the program, also as `python cmd/studio_runner`."""

from __future__ import annotations

from runner.cli.main import main

raise SystemExit(main())
