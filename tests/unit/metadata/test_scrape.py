from __future__ import annotations

import json
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.metadata.scrape import MAX_LINE_BYTES, Scraper


def scraped(text, step=None):
    scraper, found = Scraper(), []
    for start in range(0, len(text), step or len(text) or 1):
        found += scraper.feed(text[start : start + (step or len(text))])
    return found + scraper.finish(), scraper


OUTPUT = (
    b"""starting
{"experiment": {"epoch": 1}}
  \t{"a": 1}  \r
not {"a": 2}
{"a": 3} not
{not json}
{'python': 'dict'}
[{"op": "add", "path": "/x", "value": 1}]
 [ {"op": "remove", "path": "/x"} ]
[1, 2]
[INFO] something [x]
{}
[]
"""
    + '{"name": "größer"}\n'.encode()
    + b'{"half": "\xff"}\n\0\0{"b": 1}\n\n\n{"loss": NaN}\n{"last": true}'
)

FOUND = [
    {"experiment": {"epoch": 1}},
    {"a": 1},
    [{"op": "add", "path": "/x", "value": 1}],
    [{"op": "remove", "path": "/x"}],
    {"name": "größer"},
    {"half": "\ufffd"},
    {"loss": None},
    {"last": True},
]


@pytest.mark.parametrize("step", [None, 1, 2, 3, 7, 50])
def test_directives_come_in_order_whatever_the_pieces(step):
    found, scraper = scraped(OUTPUT, step)
    assert [json.loads(json.dumps(directive).replace("NaN", "null")) for directive in found] == FOUND
    assert (scraper.unparsable, scraper.too_long) == (0, 0)


def test_nan_stays_a_number_until_it_is_written():
    [directive], _ = scraped(b'{"loss": NaN}\n')
    assert math.isnan(directive["loss"])


def test_what_looks_like_json_and_is_none_is_counted():
    found, scraper = scraped(
        b'{"a": }\n[{"a" 1}]\n{"a" 1}\n{"ok": 1}\n{"a": "\0"}\n' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"\n"
    )
    assert found == [{"ok": 1}]
    assert scraper.unparsable == 5


@given(
    st.lists(
        st.sampled_from(
            [
                b'{"a": 1}',
                b"text",
                b"{",
                b"[",
                b'[{"a": 1}]',
                b"\n",
                b"\r\n",
                b" ",
                b"\0",
                b"\xff",
                b"}",
                b'"x"',
            ]
        )
    ),
    st.data(),
)
def test_pieces_never_matter(parts, data):
    text = b"".join(parts)
    whole, scraper = scraped(text)
    pieces = Scraper()
    found, start = [], 0
    while start < len(text):
        end = data.draw(st.integers(start + 1, len(text)))
        found += pieces.feed(text[start:end])
        start = end
    assert found + pieces.finish() == whole
    assert pieces.unparsable == scraper.unparsable


@given(st.binary())
def test_any_bytes_do_no_harm(text):
    scraped(text)
    scraped(b'{"' + text + b'"}\n')


def line_of(length):
    return b'{"a": "' + b"x" * (length - 9) + b'"}'


@pytest.mark.parametrize("step", [None, 1 << 20])
def test_lines_are_looked_at_up_to_a_length(step):
    text = (
        line_of(MAX_LINE_BYTES - 1)
        + b"\n"
        + line_of(MAX_LINE_BYTES + 1)
        + b"\n"
        + b'{"b": 1}\n'
        + line_of(MAX_LINE_BYTES + 1)
    )
    found, scraper = scraped(text, step)
    assert [list(directive) for directive in found] == [["a"], ["b"]]
    assert scraper.too_long == 2


@pytest.mark.parametrize("piece", [b"x", b" ", b"\0", b'{"a', b"["])
def test_a_line_without_end_takes_bounded_memory(piece):
    scraper = Scraper()
    tracemalloc.start()
    try:
        for _ in range(150):  # a new object each time: one that is kept counts
            assert scraper.feed(piece * (1 << 20)) == []
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_LINE_BYTES + (32 << 20)
    finally:
        tracemalloc.stop()
    assert scraper.feed(b'\n{"b": 1}\n') == [{"b": 1}]


def test_nothing_at_all():
    assert scraped(b"")[0] == []
    assert scraped(b"\n")[0] == []
