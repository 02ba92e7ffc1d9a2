from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from runner.telemetry import metrics

RUN = metrics.Run(kind="rabbitmq", queue="rmq_x", project='p "1"\n', experiment="e1")


@pytest.fixture
def counts():
    return metrics.Metrics(CollectorRegistry(), "host1")


def samples(counts, name):
    """(labels, value) of each sample called exactly `name`."""
    families = text_string_to_metric_families(counts.render().decode())
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return [(sample.labels, sample.value) for sample in found]


def everything(counts):
    counts.refresh("amqp://u:canary@h/", ok=True)
    counts.refresh("https://canary@h", ok=False)
    counts.checked("rabbitmq", "rmq_x")
    counts.ignored("rabbitmq", "other")
    counts.experiment_started(RUN, wait_secs=12.5)
    counts.stage("download", 0.2)
    counts.attempt()
    counts.dead_letter("malformed")
    counts.delivery("ack")
    counts.cache_hit()
    counts.cache_miss()
    counts.scraped(10)
    counts.bad_directive()
    counts.uploaded(20)
    counts.watch_free(lambda: metrics.Free(cores=3, mem_bytes=4, disk_bytes=5, gpu_slots=6))


def test_the_references_names_are_there_as_they_are(counts):
    everything(counts)
    queue = {"host": "host1", "queue_type": "rabbitMQ", "queue_name": "rmq_x"}
    run = {**queue, "queue_type": "rmq", "project": RUN.project}
    assert samples(counts, "runner_queue_refresh_success") == [
        ({"host": "host1", "project": "amqp://***@h/"}, 1)
    ]
    assert samples(counts, "runner_queue_refresh_fail") == [
        ({"host": "host1", "project": "https://***@h"}, 1)
    ]
    assert samples(counts, "runner_queue_checked") == [(queue, 1)]
    assert samples(counts, "runner_queue_ignored") == [({**queue, "queue_name": "other"}, 1)]
    assert samples(counts, "runner_project_running") == [({**run, "experiment": "e1"}, 1)]
    counts.experiment_finished(RUN, status="completed", reason="exit")
    assert samples(counts, "runner_project_completed") == [(run, 1)]
    for name in ("hits", "misses"):
        assert samples(counts, f"runner_cache_{name}") == [({"host": "host1"}, 1)]
    free = {"cpu_free_slots": 3, "cpu_ram_free_bytes": 4, "disk_free_bytes": 5, "gpu_free_slots": 6}
    for name, value in free.items():
        assert samples(counts, f"runner_resource_{name}") == [({"host": "host1"}, value)]


def test_each_card_has_its_own_series_while_it_is_there(counts):
    card = metrics.Gpu(
        uuid="GPU-a", name="Tesla T4", slots=4, free_slots=1, memory_bytes=16, used_bytes=5, fenced=False
    )
    cards = [card]
    counts.watch_free(lambda: metrics.Free(cores=0, mem_bytes=0, disk_bytes=0, gpus=cards))
    values = {"slots": 4, "free_slots": 1, "memory_bytes": 16, "memory_used_bytes": 5, "fenced": 0}
    for name, value in values.items():
        assert samples(counts, f"runner_gpu_{name}") == [({"gpu": "GPU-a", "name": "Tesla T4"}, value)]
    cards.clear()
    assert not samples(counts, "runner_gpu_slots")


def test_the_well_formed_ones_stand_beside_them(counts):
    everything(counts)
    counts.experiment_finished(RUN, status="failed", reason="oom")
    expected = {
        "runner_experiments_finished_total": [({"status": "failed", "reason": "oom"}, 1)],
        "runner_attempts_total": [({}, 1)],
        "runner_dead_letters_total": [({"reason": "malformed"}, 1)],
        "runner_deliveries_total": [({"outcome": "ack"}, 1)],
        "runner_scrape_bytes_total": [({}, 10)],
        "runner_scrape_skipped_total": [({}, 1)],
        "runner_upload_bytes_total": [({}, 20)],
        "runner_experiments_running": [({}, 0)],
        "runner_queue_wait_seconds_sum": [({}, 12.5)],
        "runner_stage_duration_seconds_count": [({"stage": "download"}, 1)],
    }
    assert {name: samples(counts, name) for name in expected} == expected
    assert samples(counts, "runner_info")[0][0]["version"]


def test_a_running_series_ends_with_its_experiment(counts):
    counts.experiment_started(RUN)
    counts.experiment_started(RUN)  # the same experiment twice: a redelivery beside a new run
    assert samples(counts, "runner_experiments_running") == [({}, 2)]
    assert samples(counts, "runner_project_running")[0][1] == 2
    counts.experiment_finished(RUN, status="completed", reason="exit")
    counts.experiment_finished(RUN, status="completed", reason="exit")
    assert samples(counts, "runner_project_running") == []
    assert samples(counts, "runner_project_completed")[0][1] == 2


def test_labels_are_bounded(counts, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_SERIES", 5)
    for number in range(20):
        counts.checked("rabbitmq", f"rmq_{number}")
        run = metrics.Run(kind="sqs", queue=f"q{number}", project="p", experiment=f"e{number}")
        counts.experiment_started(run)
        counts.experiment_finished(run, status="completed", reason="exit")
    checked = {labels["queue_name"]: value for labels, value in samples(counts, "runner_queue_checked")}
    assert checked == {**{f"rmq_{number}": 1 for number in range(5)}, metrics.OTHERS: 15}
    assert len(samples(counts, "runner_project_completed")) == 6
    assert samples(counts, "runner_project_running") == []
    assert samples(counts, "runner_queues_checked_total") == [({"queue_type": "rabbitMQ"}, 20)]
    counts.queue_gone("rabbitmq", "rmq_0")
    counts.queue_gone("rabbitmq", "never seen")
    assert "rmq_0" not in {labels["queue_name"] for labels, _ in samples(counts, "runner_queue_checked")}


def test_stages_from_milliseconds_to_days_fall_into_different_buckets(counts):
    lengths = [0.02, 0.5, 5, 100, 2000, 20_000, 100_000]
    for length in lengths:
        counts.stage("run", length)
    buckets = samples(counts, "runner_stage_duration_seconds_bucket")
    assert len({value for _, value in buckets}) == len(lengths) + 1


def test_no_secret_in_the_text(counts):
    everything(counts)
    assert b"canary" not in counts.render()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_the_text(counts):
    everything(counts)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=counts.render(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
