"""Child processes: a warm parent, a supervisor per run, a bounded kill ladder, no survivor; and a tail of growing files.

DESIGN.md rules 6 and 7.
"""

from __future__ import annotations
