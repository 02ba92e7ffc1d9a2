from __future__ import annotations

import pytest

from runner.resources.cards import Card
from runner.resources.visibility import visible


def card(index: str, uuid: str, whole: str = "") -> Card:
    return Card(uuid=uuid, name="x", index=index, memory_bytes=1, whole=whole)


CARDS = [
    card("0", "GPU-aa11"),
    card("1", "GPU-aa22"),
    card("2:0", "MIG-c1", "GPU-bb33"),
    card("2:1", "MIG-c2", "GPU-bb33"),
]


def seen(contained=False, **environ: str) -> list[str]:
    return [each.index for each in visible(CARDS, environ, contained=contained)]


ALL = ["0", "1", "2:0", "2:1"]


def test_unset_leaves_all():
    assert seen() == ALL


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"])
@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("all", ALL),
        ("ALL", ALL),
        ("", []),
        ("-1", []),
        ("none", []),
        ("void", []),
        ("NoDevFiles", []),
        ("1", ["1"]),
        (" 1 , 0 ", ["0", "1"]),
        ("0,0", ["0"]),
        ("7", []),
        ("0,7,99999999999999999999", ["0"]),
        ("GPU-aa22", ["1"]),
        ("gpu-AA2", ["1"]),
        ("GPU-aa", []),  # of two cards
        ("GPU-aa,GPU-aa11", ["0"]),
        ("2", ["2:0", "2:1"]),
        ("2:1", ["2:1"]),
        ("MIG-c1", ["2:0"]),
        ("GPU-bb33", ["2:0", "2:1"]),
        ("GPU-nobody,MIG-nobody,?", []),
        (",", []),
    ],
)
def test_entries(name, text, left):
    assert seen(**{name: text}) == left


def test_each_that_is_set_restricts():
    assert seen(CUDA_VISIBLE_DEVICES="0,1", NVIDIA_VISIBLE_DEVICES="1,2") == ["1"]
    assert seen(CUDA_VISIBLE_DEVICES="0,1", NVIDIA_VISIBLE_DEVICES="none") == []


def test_in_a_container_the_indices_of_the_host_have_been_obeyed():
    assert seen(contained=True, NVIDIA_VISIBLE_DEVICES="4,5,6,7") == ALL
    assert seen(contained=True, NVIDIA_VISIBLE_DEVICES="1") == ["1"]
    assert seen(contained=True, CUDA_VISIBLE_DEVICES="4,5,6,7") == []
    assert seen(contained=True, NVIDIA_VISIBLE_DEVICES="GPU-aa11,x,y,z") == ["0"]
