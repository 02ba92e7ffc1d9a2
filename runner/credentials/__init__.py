"""Accounts: what opens queues. A directory of credentials becomes `Account` values, and events when it changes.

`accounts` has the values, `directory` reads, `watch` compares. What an account's broker is spoken to with is `queues`'.
"""

from __future__ import annotations
