"""Queues: the contracts (`base`), one module a broker, discovery with its name filter (`catalog`)."""

from __future__ import annotations
