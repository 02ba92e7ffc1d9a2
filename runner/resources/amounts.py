"""Amounts of a machine's resources: what is asked for, what is granted. Pure."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amounts:
    """What one experiment asks for, or what a machine has. INTEROP.md 1.3."""

    cpus: int = 0  #: logical cores
    ram_bytes: int = 0
    hdd_bytes: int = 0
    gpus: int = 0  #: slots (INTEROP.md 8.1), not cards; 0 is none, whatever the two below say
    gpu_mem_bytes: int = 0  #: free memory wanted on each card
    gpu_count: int = 0  #: exactly that many cards; 0 leaves it to the allocator
