"""Settings of hypothesis for every test below."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("patient", deadline=None)  # no test depends on being fast
settings.load_profile("patient")
