"""Executors: what a workload runs in. The contract (`base`) and one module an engine."""

from __future__ import annotations
