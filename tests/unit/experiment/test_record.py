from __future__ import annotations

from pathlib import Path

import pytest

from runner import config
from runner.experiment.record import metadata_store


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("s3://minio:9000/bucket", "s3://minio:9000/bucket/m"),
        ("s3://minio:9000/bucket/", "s3://minio:9000/bucket/m"),
        ("s3://minio:9000/bucket/a/b/", "s3://minio:9000/bucket/a/b/m"),
        ("file:///srv/manifests", "file:///srv/manifests/m"),
        ("file:///srv/x-/", "file:///srv/x-/m"),
    ],
)
def test_a_store_may_be_a_whole_bucket(given, uri):
    place = metadata_store(config.parse([f"--metadata-store={given}"], {}, Path("/tmp")))
    assert place.at(f"{place.key}/m".lstrip("/")).uri == uri
