"""A StudioML-compatible runner: pulls machine-learning experiments from queues and runs them.

Rooms and their order are drawn in docs/design.md; imports run downward only, and a test holds them to it.
"""

from __future__ import annotations

__version__ = "0.1.0"
