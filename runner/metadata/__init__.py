"""The metadata artifact: scraping what the workload prints into one JSON document (DESIGN.md 5.6)."""

from __future__ import annotations
