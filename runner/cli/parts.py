"""Which concrete parts a configuration asks for: the one place that chooses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.daemon.service import Parts
from runner.executors.venv import VenvExecutor
from runner.queues import registry
from runner.storage.cache import ArtifactCache
from runner.storage.registry import Stores

if TYPE_CHECKING:
    from typing import Literal

    from runner.config import Config
    from runner.queues.base import QueueBackend
    from runner.telemetry.metrics import Metrics


def parts(config: Config) -> Parts:
    """The parts of a daemon. No I/O.

    Raises:
        errors.UsageError: an account's URL cannot be used.
    """
    return Parts(
        backends=_backends(config),
        executor=lambda spawner: VenvExecutor(config.environments, spawner),
        stores=Stores(config.s3),
        cache=lambda metrics: _cache(config, metrics),
    )


def _backends(config: Config) -> list[QueueBackend]:
    backends: list[QueueBackend] = []
    queues = config.queues
    if queues.amqp_url is not None:
        backends.append(registry.load("rabbitMQ")(queues.amqp_url, queues.amqp_management_url))  # type: ignore[call-arg]
    if queues.root is not None:
        backends.append(registry.load("local")(queues.root))  # type: ignore[call-arg]
    return backends


def _cache(config: Config, metrics: Metrics) -> ArtifactCache | None:
    if config.cache.directory is None:
        return None

    def observed(what: Literal["hit", "miss"]) -> None:
        metrics.cache_hit() if what == "hit" else metrics.cache_miss()

    return ArtifactCache(config.cache.directory, config.cache.size_bytes, observed=observed)
