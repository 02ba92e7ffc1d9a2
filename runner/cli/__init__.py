"""The command line, one file a verb. The composition root: the only place that names concrete backends."""

from __future__ import annotations
