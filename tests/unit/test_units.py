from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.units import format_bytes, parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, 0), ("", 0), ("  ", 0), (0, 0), ("0", 0), (17, 17), (1.9, 1), ("1024", 1024),
        ("3g", 3 * 10**9), ("3gb", 3 * 10**9), ("10G", 10**10), ("10GB", 10**10), ("60gb", 60 * 10**9),
        ("4 gb", 4 * 10**9), (" 4\tGb ", 4 * 10**9), ("512m", 512 * 10**6), ("2GiB", 2 * 2**30), ("2gi", 2 * 2**30),
        ("1kib", 1024), ("1Ki", 1024), ("7b", 7), ("7 B", 7), ("1,024", 1024), ("1,000.5k", 1_000_500),
        ("1.5g", 1_500_000_000), (".5k", 500), ("5.k", 5000), ("1t", 10**12), ("1pib", 2**50), ("2e", 2 * 10**18),
        ("1eib", 2**60), ("0.1k", 100), ("9007199254740993", 2**53 + 1), (2**63 - 1, 2**63 - 1),
    ],
)  # fmt: skip
def test_sizes(value, count):
    assert parse_bytes(value) == count


@pytest.mark.parametrize(
    "value",
    [
        True, False, -1, -0.5, "-3g", "+3g", math.nan, math.inf, 1e300, 2**200, 2**63, "16e", "9" * 5000,
        "3x", "g", "1e3", "3 g b", "1.2.3g", ".", ",", "3gbb", "NaN", "inf", "0x10", [], {}, b"3g", "٣g", "1_000", "3g\0",
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_an_example(value):
    with pytest.raises(ValueError, match="is not a size; examples: 512mb, 3g, 2GiB"):
        parse_bytes(value)


def test_the_refusal_names_the_value():
    with pytest.raises(ValueError, match="'3 elephants' is not a size"):
        parse_bytes("3 elephants")
    with pytest.raises(ValueError, match="'soon' is not a duration; examples: 30s, 1h30m, 2d"):
        parse_duration("soon")


@pytest.mark.parametrize(
    ("value", "secs"),
    [
        (30, 30.0), (1.5, 1.5), (-3, -3.0), (0, 0.0), ("0", 0.0), ("30", 30.0), ("-30", -30.0), ("1.5", 1.5), (" 30 ", 30.0),
        ("20m", 1200.0), ("1h30m", 5400.0), ("1h 30m", 5400.0), ("1 h 30 m", 5400.0), ("48h2m10s", 172930.0), ("5H", 18000.0),
        ("-10m", -600.0), ("+10m", 600.0), ("-1h30m", -5400.0), ("1.5h", 5400.0), (".5s", 0.5), ("5.s", 5.0), ("1m1h", 3660.0),
        ("2d", 172800.0), ("1w", 604800.0), ("1w2d", 777600.0), ("250ms", 0.25), ("3MS", 0.003), ("7us", 7e-6), ("7\u00b5s", 7e-6),
        ("7\u03bcs", 7e-6), ("5ns", 5e-9), ("0s", 0.0), ("1h1ms", 3600.001),
    ],
)  # fmt: skip
def test_durations(value, secs):
    assert parse_duration(value) == secs


@pytest.mark.parametrize(
    "value",
    [
        None, "", "  ", True, False, math.nan, math.inf, -math.inf, 1e300, 2**200, "9" * 5000, "1h30", "h", "m5", "1y",
        "--5m", "+", "-", "5m-", "1e3", "1h,30m", [], {}, b"5m", "٣m", "1_0s", "5 m x", "999999999999h", "1m" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_an_example(value):
    with pytest.raises(ValueError, match="is not a duration; examples: 30s, 1h30m, 2d"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (3 * 10**9, "3 GB"), (1_250_000_000_000, "1.25 TB"),
     (999_999, "1 MB"), (100, "100 B"), (512_300_000, "512.3 MB"), (-2000, "-2 KB"), (200_000, "200 KB"),
     (2**63 - 1, "9.22 EB")],
)  # fmt: skip
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text


@given(st.integers(0, 2**63 - 1))
def test_a_formatted_size_reads_as_nearly_itself(count):
    text = format_bytes(count)
    assert abs(parse_bytes(text) - count) <= count * 0.0051
    assert format_bytes(parse_bytes(text)) == text


@given(st.integers(0, 2**63 - 1))
def test_plain_numbers_are_exact(count):
    assert parse_bytes(str(count)) == parse_bytes(count) == parse_bytes(f"{count} b") == count


@given(
    st.one_of(
        st.text(), st.floats(), st.integers(), st.from_regex(r"[-+]?[0-9.,]{1,20} ?[kmgtpeihsdwub]{0,3}")
    )
)
def test_anything_is_a_number_or_a_value_error(value):
    failures = []
    for parse in (parse_bytes, parse_duration):
        try:
            assert isinstance(parse(value), int | float)
        except ValueError as refusal:
            failures.append(str(refusal))
    assert all("examples:" in text for text in failures)


@pytest.mark.parametrize("parse", [parse_bytes, parse_duration])
def test_an_integer_too_long_to_print_is_refused(parse):
    with pytest.raises(ValueError, match="this int is not"):
        parse(10**5000)
