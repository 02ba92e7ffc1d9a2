"""Accounts: what opens queues."""

from __future__ import annotations
