"""What every test may use."""

from __future__ import annotations

pytest_plugins = [
    "tests.servers.daemon",
    "tests.servers.faulty_http",
    "tests.servers.rabbitmq",
    "tests.servers.pubsub",
    "tests.servers.seaweedfs",
    "tests.servers.moto_sqs",  # it uses the one before
    "tests.servers.studioml_client",
    "tests.servers.apptainer",
]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names of tests are the same in every process: compressed bytes hold the time, and random ones are random."""
    if isinstance(val, bytes) and (len(val) > 20 or val.startswith(b"\x1f\x8b")):
        return f"{argname}-of-{len(val)}-bytes"
    return None
