"""The machine's cores, memory, disk and GPUs: reserved all or nothing, never promised twice."""

from __future__ import annotations
