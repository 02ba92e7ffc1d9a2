"""What every experiment needs and one daemon has once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.config import Config
    from runner.executors.base import Executor
    from runner.process.base import User
    from runner.process.cgroups import Groups
    from runner.process.spawner import Spawner
    from runner.resources.allocator import Allocator
    from runner.resources.gpuwatch import GpuWatch
    from runner.resources.usage import Sampler
    from runner.storage.base import Location
    from runner.storage.cache import ArtifactCache
    from runner.storage.registry import Stores
    from runner.telemetry.metrics import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """Shared by all runs; made by `daemon.service`, closed by it after the last run."""

    config: Config
    host: str
    spawner: Spawner
    executor: Executor
    stores: Stores
    cache: ArtifactCache | None  #: None: every artifact is fetched anew
    metrics: Metrics
    allocator: Allocator
    gpus: GpuWatch
    sampler: Sampler
    groups: Groups | None = None  #: None: no control groups can be made here; what runs use is measured
    user: User | None = None  #: --run-as
    unlistable: set[Location] = dataclasses.field(
        default_factory=set
    )  #: places whose objects may not be listed
