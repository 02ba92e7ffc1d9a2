from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.metadata.names import Accession, base62, claim_second, from_base62, safe_component

VECTORS = [
    (1541618418, "1gKTNC"),
    (1541618464, "1gKTNw"),
    (1546495043, "1gew0R"),
    (1700000000, "1r31eq"),
    (1763000000, "1vJMps"),
    (0, ""),
]


@pytest.mark.parametrize(("second", "token"), VECTORS)
def test_the_documented_vectors(second, token):
    assert base62(second) == token
    assert from_base62(token) == second


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_tokens_of_one_length_sort_by_time(one, other):
    assert from_base62(base62(one)) == one
    if len(base62(one)) == len(base62(other)):
        assert (base62(one) < base62(other)) == (one < other)


@pytest.mark.parametrize("text", ["a-b!", "a-b c", "nodash", "h-é"])
def test_no_accession(text):
    with pytest.raises(ValueError):
        Accession.parse(text)


@pytest.mark.parametrize("host", ["h", "gpu-box-3.example.com", "h/../x", "häuschen", ""])
def test_names_of_the_three_objects(host):
    accession = Accession(host, 1700000000)
    assert accession.output_name == f"output-host-{accession}.log"
    assert accession.runner_name == f"runner-host-{accession}.log"
    assert accession.scrape_name == f"scrape-host-{accession}.json"
    assert str(accession).endswith("-1r31eq")
    assert "/" not in str(accession)
    if host:
        assert Accession.parse(str(accession)) == accession


def test_a_plain_host_stays_as_it_is():
    assert str(Accession("gpu-box-3.example.com", 1700000000)) == "gpu-box-3.example.com-1r31eq"
    with pytest.raises(ValueError):
        Accession("h", -1)


@given(st.lists(st.text(), unique=True, min_size=2, max_size=2))
def test_components_are_safe_and_stay_different(pair):
    one, other = (safe_component(name) for name in pair)
    assert one != other
    assert one
    assert not one.startswith(".")
    assert not set(one) & set("/\\\0 ")
    assert len(one) <= 150


def test_long_components_that_begin_alike_stay_different():
    one, other = (safe_component("x" * 400 + last) for last in "ab")
    assert one != other
    assert len(one) == 150


def test_a_second_is_taken_once(tmp_path):
    assert [claim_second(tmp_path, "h", 100.9) for _ in range(3)] == [100, 101, 102]
    assert claim_second(tmp_path, "h", 101.5) == 103
    assert claim_second(tmp_path, "other", 100) == 100


def test_a_clock_that_jumps_leaves_no_trouble(tmp_path):
    assert claim_second(tmp_path, "h", 5000) == 5000
    assert claim_second(tmp_path, "h", 100) == 100
    assert claim_second(tmp_path, "h", 102) == 102
    assert claim_second(tmp_path, "h", 100) == 101
    assert claim_second(tmp_path, "h", 100) == 103
    assert claim_second(tmp_path, "h", 4999) == 4999
    assert claim_second(tmp_path, "h", 4999) == 5001
    assert claim_second(tmp_path, "h", -5) == 0


@given(st.lists(st.integers(0, 30), max_size=40))
def test_any_order_of_claims_gives_each_the_first_free_second(tmp_path_factory, nows):
    directory, taken = tmp_path_factory.mktemp("state"), set()
    for now in nows:
        expected = next(second for second in range(now, 100) if second not in taken)
        assert claim_second(directory, "h", now) == expected
        taken.add(expected)


@pytest.mark.parametrize("damage", ["", "{", "{}", "[1]", "[[1]]", '[["a", 2]]', "null", "[[true, 2]]"])
def test_a_damaged_record_is_an_empty_one(tmp_path, damage):
    claim_second(tmp_path, "h", 100)
    (tmp_path / "accessions" / "h.json").write_text(damage)
    assert claim_second(tmp_path, "h", 100) == 100


def test_the_record_does_not_grow_without_end_and_forgets_the_oldest(tmp_path):
    record = tmp_path / "accessions" / "h.json"
    for number in range(600):
        claim_second(tmp_path, "h", number * 10_000_000)
        assert record.stat().st_size <= 4096
    kept = json.loads(record.read_bytes())
    assert kept == [[n * 10_000_000, n * 10_000_000] for n in range(600 - len(kept), 600)]
    assert len(kept) > 100
    assert claim_second(tmp_path, "h", 5_990_000_000) == 5_990_000_001


def claim_some(directory):
    return [claim_second(directory, "h", 1000) for _ in range(50)]


def test_threads_and_processes_never_share_a_second(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool, ThreadPoolExecutor(4) as threads:
        elsewhere = pool.map_async(claim_some, [tmp_path] * 4)
        here = list(threads.map(claim_some, [tmp_path] * 4))
        claims = [second for claims in [*here, *elsewhere.get(60)] for second in claims]
    assert sorted(claims) == list(range(1000, 1400))
