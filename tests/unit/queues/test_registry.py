from __future__ import annotations

import pytest

from runner.queues.filequeue import FileBackend
from runner.queues.registry import load


def test_a_kind_gives_its_class():
    assert load("local") is FileBackend


def test_an_unknown_kind_is_told():
    with pytest.raises(KeyError):
        load("carrier pigeon")
