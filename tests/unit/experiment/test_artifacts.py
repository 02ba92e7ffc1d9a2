from __future__ import annotations

from runner.experiment.artifacts import _single_file


def test_a_lone_file_is_stored_as_it_is_and_never_through_a_link(tmp_path):
    """A workload that runs may put a link in its place whenever it likes; the daemon may read more than it may."""
    place = tmp_path / "place"
    place.mkdir()
    assert _single_file(place) is None
    (place / "one").write_bytes(b"own")
    single = _single_file(place)
    assert single is not None
    with single:
        assert single.read() == b"own"
    (tmp_path / "linked").symlink_to(place)
    assert _single_file(tmp_path / "linked") is None
    (place / "two").touch()
    assert _single_file(place) is None
    (place / "two").unlink()
    (place / "one").rename(tmp_path / "secret")
    (place / "one").symlink_to(tmp_path / "secret")
    assert _single_file(place) is None
