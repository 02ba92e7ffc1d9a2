"""What an experiment finds in its own artifacts when it starts."""

from __future__ import annotations

import io
import json
import re
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages

if TYPE_CHECKING:
    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.seaweedfs import SeaweedFs

SCRIPT = """
import json, os
print(json.dumps({"experiment": {tag: sorted(os.listdir(f"../{tag}")) for tag in ("modeldir", "retval", "elsewhere")}}))
"""


@pytest.mark.service
def test_what_an_earlier_run_left_is_staged_and_what_is_not_there_is_empty(
    daemons: MakeDaemon, seaweedfs: SeaweedFs
):
    bucket = seaweedfs.make_bucket("staging")

    def leave(key: str, name: str) -> None:
        data = messages.archive({name: "x"})
        seaweedfs.client().put_object(bucket, key, io.BytesIO(data), len(data))

    leave("experiments/again/modeldir.tar", "model")
    leave("experiments/again/modeldir.tar.old", "wrong")
    leave("shared/elsewhere.tar", "shared-model")
    elsewhere = {"elsewhere": {"mutable": True, "unpack": True, "key": "shared/elsewhere.tar"}}
    daemon = daemons("--cache-dir=cache", "--cache-size=100mb")
    queue = daemon.queue_root / "local_staging"
    queue.mkdir()
    body = messages.on_s3(seaweedfs, bucket, SCRIPT, "again", artifacts=elsewhere)
    (queue / "m1").write_bytes(body)
    daemon.until(lambda: [run for run in daemon.runs() if run["stage"] == "done"])
    found = list(seaweedfs.client().list_objects(bucket, prefix="metadata/scrape-host-"))
    document = json.loads(seaweedfs.client().get_object(bucket, str(found[0].object_name)).read())
    assert document["experiment"] == {"modeldir": ["model"], "retval": [], "elsewhere": ["shared-model"]}
    # What was staged and not changed is not stored again, what was made is.
    names = {str(item.object_name) for item in seaweedfs.client().list_objects(bucket, recursive=True)}
    assert "experiments/again/retval.tar" not in names
    answer = seaweedfs.client().get_object(bucket, "experiments/again/output.tar")
    with tarfile.open(fileobj=io.BytesIO(answer.read())) as output:
        assert "output" in output.getnames()
    # What does not change is fetched once: the workspace, and nothing else.
    assert cache(daemon) == {"miss": 1}
    (queue / "m2").write_bytes(body)
    daemon.until(lambda: len([run for run in daemon.runs() if run["stage"] == "done"]) == 2)
    assert cache(daemon) == {"miss": 1, "hit": 1}


def cache(daemon: Daemon) -> dict[str, float]:
    """How often artifacts were asked of it, by outcome."""
    told = daemon.get("/metrics").decode()
    found = re.findall(r'^runner_cache_requests_total\{outcome="(\w+)"\} (\S+)$', told, re.MULTILINE)
    return {outcome: float(count) for outcome, count in found if float(count)}
