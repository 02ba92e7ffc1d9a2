"""The service: which queue next, what becomes of a message, what survives a restart."""

from __future__ import annotations
