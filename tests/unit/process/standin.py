"""A daemon's stand-in that can be killed: starts the commands it is given as JSON, says their ids, and waits."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from runner.process import base, cgroup, spawner


async def main() -> None:
    starter = spawner.Spawner()
    await starter.open()
    processes = []
    for fields in json.loads(sys.argv[1]):
        group = fields["group"] and cgroup.Group(*fields["group"])
        paths = {"cwd": Path(fields["cwd"]), "output": Path(fields["output"])}
        command = base.Command(**{**fields, **paths, "group": group})
        processes.append(await starter.start(command))
    nursery = starter._nursery
    assert nursery is not None
    ids = {
        "nursery": nursery._program.pid,
        "supervisors": [process.supervisor_pid for process in processes],
        "workloads": [process.pid for process in processes],
    }
    print(json.dumps(ids), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
