"""What the command line and other programs use: submit, follow, query."""

from __future__ import annotations
