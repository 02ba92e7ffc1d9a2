"""No secret of anybody's is seen anywhere (DESIGN.md rule 9): canaries in every place where secrets come in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import MakeDaemon
    from tests.servers.rabbitmq import RabbitmqServer
    from tests.servers.seaweedfs import SeaweedFs

pytestmark = pytest.mark.service

#: The runner's own: in its environment and in its options.
OWN = {
    "AWS_SECRET_ACCESS_KEY": "canary-own-aws",
    "HTTP_TOKEN": "canary-own-token",
    "SOME_PASSWORD": "canary-own-password",
    "FTP_PROXY": "http://user:canary-own-proxy@127.0.0.1:9",
}
#: Prints what a workload can see of its surroundings, itself and its ancestors.
LOOK = """
import os, pathlib
print(dict(os.environ))
pid = os.getpid()
for _ in range(3):  # the supervisor, its guard and the nursery; the daemon above them has what it was given
    pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    print(pathlib.Path(f"/proc/{pid}/environ").read_bytes(), pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
"""


def test_canaries(
    daemons: MakeDaemon, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, tmp_path: pathlib.Path
):
    rabbitmq.add_user("canary-user", "canary-broker-password", tags="management")
    rabbitmq.declare("rmq_canaries", durable=True)
    manifests = tmp_path / "manifests"
    daemon = daemons(
        f"--amqp-mgt-url={rabbitmq.management_url}",
        "--queue-match=^rmq_canaries$",  # other tests leave queues behind
        f"--metadata-store=file://{manifests}",
        "--debug",
        env=OWN | {"AMQP_URL": rabbitmq.url(user="canary-user", password="canary-broker-password")},
    )
    bucket = seaweedfs.make_bucket("canaries")
    secret = seaweedfs.location(bucket).credentials
    assert secret is not None
    config = {
        "env": {"MY_TOKEN": "canary-message-env"},
        "cloud": {"queue": {"rmq": "amqp://u:canary-url@h/"}},
    }
    extra = {"canary": {"mutable": False, "qualified": "https://user:canary-userinfo@127.0.0.1:1/x"}}
    good = json.loads(messages.on_s3(seaweedfs, bucket, LOOK, "good", config=config))
    bad = json.loads(messages.on_s3(seaweedfs, bucket, LOOK, "bad", config=config, artifacts=extra))
    worse = b'{"experiment": {"key": 1, "x": "amqp://u:canary-nonsense@h/", "password": "canary-password"}'
    rabbitmq.publish(
        "rmq_canaries", json.dumps(good).encode(), json.dumps(bad).encode(), worse, persistent=True
    )
    daemon.until(lambda: len(daemon.dead_letters()) >= 1 and rabbitmq.depth("rmq_canaries") == 0)
    daemon.until(lambda: any(run["experiment"] == "good" and run["stage"] == "done" for run in daemon.runs()))

    client = seaweedfs.client()
    stored = {
        each.object_name: client.get_object(bucket, each.object_name).read()
        for each in client.list_objects(bucket, recursive=True)
        if each.object_name.startswith(("metadata/", "experiments/"))
    }
    output = next(data for name, data in stored.items() if name.startswith("metadata/output-host-")).decode()
    assert "STUDIOML_HOME" in output  # it did look
    seen = {
        "the workload's surroundings": output.replace("canary-message-env", "")
    }  # its own variable is its own
    seen |= {name: data.decode(errors="replace") for name, data in stored.items() if "output" not in name}
    seen |= {str(path): path.read_text() for path in manifests.rglob("*.json")}
    seen |= {str(path): path.read_text() for path in (daemon.state_dir / "dead-letter").glob("*/*.json")}
    seen |= {"the log": daemon.log_text(), "/metrics": daemon.get("/metrics").decode()}
    seen |= {path: json.dumps(daemon.get(path)) for path in ("/readyz", "/api/runs", "/api/queues")}
    assert len(seen) > 8
    for place, text in seen.items():
        for canary in (
            "canary-own",
            "canary-broker",
            "canary-message",
            "canary-url",
            "canary-nonsense",
            "canary-password",
        ):
            assert canary not in text, place
        assert "canary-userinfo" not in text, place
        assert secret.secret_key not in text, place
    private = [path for path in daemon.state_dir.rglob("*.body") if path.stat().st_mode & 0o077]
    assert private == []
