"""What strangers have written (names of queues, reasons), made fit for one line of a terminal."""

from __future__ import annotations


def line(text: str) -> str:
    """One line of characters that can be seen: line breaks are spaces, what would steer a terminal is U+FFFD."""
    return "".join(each if each.isprintable() else " " if each.isspace() else "\ufffd" for each in text)
