"""Object stores: the contract (`base`), one module a protocol, archives, and the cache of immutable artifacts."""

from __future__ import annotations
