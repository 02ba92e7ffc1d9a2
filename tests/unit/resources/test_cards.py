from __future__ import annotations

import pytest

from runner import errors
from runner.resources import cards
from runner.resources.cards import Card, Slots

GIB = 1 << 30
TABLE = cards.load()


def card(name: str, gib: float = 16, whole_gib: float = 0) -> Card:
    return Card(
        uuid="GPU-1",
        name=name,
        index="0",
        memory_bytes=int(gib * GIB),
        whole="GPU-0" if whole_gib else "",
        whole_bytes=int(whole_gib * GIB),
    )


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        # what the original runner documents
        ("GeForce GTX 1050 Ti", 1),
        ("GeForce GTX 1060 6GB", 1),
        ("GeForce GTX 1070", 2),
        ("NVIDIA GeForce GTX 1080 Ti", 2),
        ("GeForce GTX TITAN X", 4),
        ("NVIDIA TITAN X (Pascal)", 4),
        ("NVIDIA GeForce RTX 2080 Ti", 2),
        ("Tesla K80", 2),
        ("Tesla P40", 4),
        ("Tesla P100-PCIE-16GB", 8),
        ("Tesla V100-SXM2-32GB", 16),
        ("NVIDIA A100-SXM4-40GB", 24),
        ("A100-PCIE-40GB", 24),
        # others on that scale; one name within another is told apart
        ("NVIDIA A100 80GB PCIe", 32),
        ("NVIDIA A100-SXM4-80GB", 32),
        ("Tesla T4", 4),
        ("NVIDIA L4", 8),
        ("NVIDIA L40S", 24),
        ("NVIDIA L40", 16),
        ("NVIDIA A10", 8),
        ("NVIDIA A10G", 8),
        ("NVIDIA A40", 16),
        ("NVIDIA H100 80GB HBM3", 48),
        ("NVIDIA H100 PCIe", 48),
        ("NVIDIA H200", 64),
        ("NVIDIA B200", 96),
        ("NVIDIA GeForce RTX 3090 Ti", 8),
        ("NVIDIA GeForce RTX 4090", 12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 6),
        ("NVIDIA GeForce RTX 5090", 16),
        ("NVIDIA RTX A4000", 4),
        ("NVIDIA RTX A6000", 12),
        ("Quadro RTX 6000", 8),
        ("NVIDIA RTX 6000 Ada Generation", 16),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 32),
    ],
)
def test_known_cards(name, slots):
    assert TABLE.slots(card(name)) == Slots(count=slots)


@pytest.mark.parametrize(
    ("gib", "slots"),
    [(0, 1), (0.5, 1), (1.9, 1), (2, 2), (5.8, 2), (8, 4), (23.99, 12), (96, 48), (600, 300)],
)
def test_an_unknown_card_is_estimated_and_never_has_none(gib, slots):
    assert TABLE.slots(card("NVIDIA X9000", gib)) == Slots(count=slots, estimated=True)


@pytest.mark.parametrize(
    ("profile", "gib", "slots"),
    [
        ("1g.5gb", 4.75, 2),
        ("2g.10gb", 9.75, 6),
        ("3g.20gb", 19.62, 12),
        ("7g.40gb", 39.5, 24),
        ("odd", 0.01, 1),
    ],
)
def test_a_mig_instance_has_its_share(profile, gib, slots):
    assert TABLE.slots(card(f"NVIDIA A100-SXM4-40GB MIG {profile}", gib, 40)) == Slots(count=slots)


def test_the_profile_of_an_instance_is_no_size_of_the_card():
    assert TABLE.slots(card("NVIDIA A100 80GB PCIe MIG 3g.40gb", 39.25, 80)).count == 16


def test_the_operators_lines_win_and_those_with_more_words_among_them(tmp_path):
    file = tmp_path / "cards.toml"
    file.write_text('[slots]\n"A100" = 7\n"a100 sxm4" = 8\n"*" = 1\n"A100 MIG 1g" = 5\n')
    table = cards.load(file)
    assert table.slots(card("NVIDIA A100-PCIE-40GB")).count == 7
    assert table.slots(card("NVIDIA A100-SXM4-40GB")).count == 8
    assert table.slots(card("Tesla T4")) == Slots(count=1)
    assert table.slots(card("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, 40)).count == 5
    assert table.slots(card("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20, 40)).count == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[slots]\n"T4" = 0', "no whole number from 1"),
        ('[slots]\n"T4" = 2.5', "no whole number"),
        ('[slots]\n"T4" = true', "no whole number"),
        ('[slots]\n"T4" = "4"', "no whole number"),
        ('[slots]\n"--" = 2', "no word of a card's name"),
        ('"T4" = 2', "one table"),
        ('[slots]\n"T4" = 2\n[more]', "one table"),
        ("[slots\n", "line 1"),
        ("\x00", "--gpu-cards="),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, why):
    file = tmp_path / "cards.toml"
    file.write_text(text)
    with pytest.raises(errors.UsageError) as told:
        cards.load(file)
    assert why in str(told.value)
    assert str(file) in str(told.value)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(errors.UsageError, match="No such file"):
        cards.load(tmp_path / "none")
