"""Messages to the response queue."""

from __future__ import annotations
