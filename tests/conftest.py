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
]
