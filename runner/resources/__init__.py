"""The machine's cores, memory and disk: reserved all or nothing, never promised twice."""

from __future__ import annotations
