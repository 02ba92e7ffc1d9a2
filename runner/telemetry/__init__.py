"""What the runner says of itself: logs, metrics, and the HTTP pages that show them."""

from __future__ import annotations
