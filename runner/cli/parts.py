"""Which concrete parts a configuration asks for: the one place that chooses them."""

from __future__ import annotations

import functools
import hashlib
import socket
from typing import TYPE_CHECKING

from runner.credentials.accounts import Account, Pubsub, QueueDirectory, Rabbitmq, Sqs
from runner.credentials.watch import Watch
from runner.daemon.service import Parts
from runner.executors.registry import Executors, Later
from runner.executors.venv import VenvExecutor
from runner.storage.cache import ArtifactCache
from runner.storage.registry import Stores

if TYPE_CHECKING:
    from typing import Literal

    from runner.config import Config
    from runner.executors.base import Executor
    from runner.process.spawner import Spawner
    from runner.queues.base import QueueBackend
    from runner.telemetry.metrics import Metrics


def parts(config: Config) -> Parts:
    """The parts of a daemon. No I/O.

    Raises:
        errors.UsageError: an account's URL cannot be used.
    """
    return Parts(
        backends=[backend(config, account) for account in named(config)],
        watches=[Watch(path, prefix) for path, prefix in config.queues.certs],
        backend=functools.partial(backend, config),
        executor=functools.partial(_executors, config),
        stores=Stores(config.s3),
        cache=lambda metrics: _cache(config, metrics),
    )


def named(config: Config) -> list[Account]:
    """The accounts that options and variables name, beside those in directories of credentials."""
    queues = config.queues
    accounts: list[Account] = []
    if queues.amqp_url is not None:
        accounts.append(Rabbitmq(label="", url=queues.amqp_url, management_url=queues.amqp_management_url))
    if queues.aws_ambient:
        accounts.append(Sqs(label="aws-ambient", directory=None, region=queues.aws_region))
    if queues.google_key is not None:
        accounts.append(Pubsub(label="google", key=queues.google_key))
    if queues.root is not None:
        accounts.append(QueueDirectory(label="local", root=queues.root))
    return accounts


def backend(config: Config, account: Account) -> QueueBackend:
    """What serves an account. No I/O but reading its key file; libraries are imported for the kinds that are used.

    Raises:
        errors.UsageError: what the account says cannot be used.
    """
    match account:
        case Rabbitmq():
            from runner.queues.rabbitmq import RabbitmqBackend

            return RabbitmqBackend(
                account.url,
                account.management_url,
                account=account.label or None,
                lease=config.queues.rmq_lease,
                owner=_owner(config),
            )
        case Sqs():
            return _sqs(config, account)
        case Pubsub():
            from runner.queues.pubsub import PubsubBackend
            from runner.queues.pubsub_account import PubsubAccount, PubsubTimes

            emulator = config.queues.pubsub_emulator
            return PubsubBackend(
                PubsubAccount.from_key(account.key, label=account.label, emulator=emulator),
                times=PubsubTimes(call_secs=config.queues.pubsub_timeout_secs),
            )
        case QueueDirectory():
            from runner.queues.filequeue import FileBackend

            return FileBackend(account.root, account=account.label)


def _sqs(config: Config, account: Sqs) -> QueueBackend:
    from runner.queues.sqs import SqsBackend
    from runner.queues.sqs_access import SqsTiming
    from runner.queues.sqs_account import SqsAccount, SqsProfile

    profile = None
    if account.directory is not None:
        profile = SqsProfile(
            credentials_file=account.directory / "credentials", config_file=account.directory / "config"
        )
    return SqsBackend(
        SqsAccount(label=account.label, region=account.region, profile=profile, ambient=profile is None),
        keep=config.paths.state_dir / "sqs",
        timing=SqsTiming(call_secs=config.queues.sqs_timeout_secs),
    )


def _executors(config: Config, spawner: Spawner) -> Executors:
    def docker() -> Executor:
        from runner.executors.docker import DockerExecutor

        return DockerExecutor(config.containers, config.paths.state_dir, spawner)

    def singularity() -> Executor:
        from runner.executors.singularity import SingularityExecutor

        return SingularityExecutor(config.images, spawner)

    return Executors(
        venv=VenvExecutor(config.environments, spawner),
        docker=Later(docker, trace=config.paths.state_dir / "containers"),
        singularity=Later(singularity, trace=config.images.cache_dir / "images"),
    )


def _owner(config: Config) -> str:
    """This daemon's name in leases: the same after a restart, another one for a daemon beside it."""
    state_dir = str(config.paths.state_dir.absolute())
    return f"{socket.gethostname()}-{hashlib.sha256(state_dir.encode()).hexdigest()[:8]}"


def _cache(config: Config, metrics: Metrics) -> ArtifactCache | None:
    if config.cache.directory is None:
        return None

    def observed(what: Literal["hit", "miss"]) -> None:
        metrics.cache_hit() if what == "hit" else metrics.cache_miss()

    return ArtifactCache(config.cache.directory, config.cache.size_bytes, observed=observed)
