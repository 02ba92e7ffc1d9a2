"""The request message: what experimenters send. Liberal in what it accepts, typed in what it refuses."""

from __future__ import annotations
