"""The documentation is held against the code: links, commands, metrics, reasons, error texts, tests that it names."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from runner import config, errors
from runner.cli import main
from runner.options import OPTIONS
from runner.telemetry import metrics
from tests.packaging import documents
from tests.packaging.documents import PAGES, ROOT

DOCS = ROOT / "docs"
OPERATING = DOCS / "operating.md"
DESIGN = DOCS / "design.md"
BLOCKS = [block for page in PAGES if "```console" in page.read_text() for block in documents.blocks(page)]
COMMANDS = [(block, command) for block in BLOCKS for command, _ in block.steps]
#: Constants that stand for anything in a message.
ANY = "..."


# -- links


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_can_be_found_from_the_readme():
    seen: set[Path] = set()
    left = [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        left += [
            (page.parent / target.partition("#")[0]).resolve()
            for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
            if not target.startswith(("http", "#"))
        ]
    assert {page for page in PAGES if page.parent == DOCS} <= seen


# -- commands


@pytest.mark.parametrize(
    ("block", "command"), COMMANDS, ids=[f"{each[0]} {each[1][:40]}" for each in COMMANDS]
)
def test_commands_name_what_there_is(block, command):
    words = shlex.split(command.partition("<<")[0].replace("&&", " ; "), comments=True)
    while words:
        end = next((n for n, word in enumerate(words) if word in {";", "|", "&"} or "&" in word), len(words))
        check(words[:end])
        words = words[end + 1 :]


def check(words: list[str]) -> None:
    match [Path(words[0]).name, *words[1:]] if words else []:
        case ["studio-runner", "serve", *arguments]:
            config.parse([word for word in arguments if not word.startswith("2>")], {})
        case ["studio-runner", "submit", *arguments]:
            known = help_of_submit()
            named = {
                word.partition("=")[0] for word in arguments[: arguments.index("--")] if word.startswith("--")
            }
            assert named <= known, named - known
        case ["studio-runner", verb, *_]:
            assert verb in main.VERBS
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["install", *arguments]:
            assert all((ROOT / word).exists() for word in arguments if word.startswith("deploy/"))
        case _:
            pass


@cache
def help_of_submit() -> set[str]:
    program = Path(sys.executable).with_name("studio-runner")
    done = subprocess.run([program, "submit", "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", done.stdout))


def test_every_block_that_can_be_run_is_run_by_a_test():
    run = {str(block.page.relative_to(ROOT)) for block in BLOCKS if block.reason is None}
    assert run == {"README.md", "docs/operating.md"}  # test_readme.py, and below


@pytest.mark.service
def test_dead_letters_are_listed_and_sent_again(daemons, rabbitmq):
    (shown,) = [block for block in BLOCKS if block.page == OPERATING and block.reason is None]
    daemon = daemons(
        "--queue-match=^(local|rmq)_hello$",
        "--queue-refresh=1s",
        f"--amqp-mgt-url={rabbitmq.management_url}",
        env={"AMQP_URL": rabbitmq.amqp_url},
        start=False,
    )
    queue = daemon.queue_root / "local_hello"
    queue.mkdir()
    daemon.arguments.append(f"--queue-root={daemon.queue_root}")
    daemon.start()
    (queue / "first").write_bytes(b"{nothing")
    daemon.until(daemon.dead_letters)
    rabbitmq.declare("rmq_hello")
    rabbitmq.publish("rmq_hello", b"[]")
    daemon.until(lambda: len(daemon.dead_letters()) == 2)
    env = {
        "STATE_DIR": str(daemon.state_dir),
        "WORKING_DIR": str(daemon.working_dir),
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    }
    documents.run(shown, daemon.working_dir, places={}, env=env)
    # They are no better than they were.
    daemon.until(lambda: len(daemon.log("message dead-lettered")) == 4)
    rabbitmq.delete("rmq_hello")


def test_the_addresses_answer_as_shown(daemons):
    (shown,) = [block for block in BLOCKS if block.page == OPERATING and "readyz" in str(block.steps)]
    daemon = daemons("--queue-refresh=1s", start=False)
    (daemon.queue_root / "local_hello").mkdir()
    daemon.start()
    daemon.until(lambda: daemon.get("/api/queues")["queues"])
    for command, printed in shown.steps:
        told = json.loads("".join(printed))
        asked = daemon.get(command.split("9090", 1)[1])
        assert set(asked) >= set(told)
        if "queues" in told:
            assert set(asked["queues"][0]) >= set(told["queues"][0])


# -- what the pages list


def test_every_metric_is_explained():
    shown = metrics.Metrics(CollectorRegistry(), "host")
    shown.watch_free(lambda: metrics.Free(cores=1, mem_bytes=1, disk_bytes=1))
    families = re.findall(r"^# HELP (runner_\w+)", shown.render().decode(), re.MULTILINE)
    text = OPERATING.read_text()
    assert len(families) > 20
    assert not [name for name in families if not re.search(rf"`{name}[`{{]", text)]
    assert not [name for name in re.findall(r"`(runner_\w+)", text) if name not in families]


def test_every_reason_is_explained():
    section = OPERATING.read_text().split("\n## Reasons\n")[1].split("\n## ")[0]
    named = re.findall(r"`([a-z-]+)`", section.split("|---|---|")[1].replace("`max_duration`", ""))
    assert sorted(named) == sorted(errors.Reason)


def texts_of_the_code() -> str:
    """Every string of the code, with `...` for what is filled in."""
    found = []
    for path in (ROOT / "runner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else ANY for part in node.values]
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_every_text_of_the_troubleshooting_is_the_codes():
    section = OPERATING.read_text().split("\n## Troubleshooting\n")[1]
    rows = re.findall(r"^\| (`.+?`) \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) > 20
    code = texts_of_the_code()
    for said, advice in rows:
        assert len(advice) > 5
        for text in re.findall(r"`(.+?)`", said):
            # What is filled in may be a text of its own: so it is looked for piece by piece.
            pieces = [piece.strip() for piece in text.split(ANY) if len(piece.strip()) > 3]
            assert pieces, text
            assert not [piece for piece in pieces if piece not in code], text


def test_the_tests_that_the_design_names_are_there():
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", DESIGN.read_text())
    assert len(named) > 25
    for path, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)


def test_the_design_names_every_room():
    section = DESIGN.read_text().split("\n## Rooms\n")[1].split("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    rooms = {path.stem for path in (ROOT / "runner").iterdir() if not path.name.startswith("_")}
    assert named == rooms


def test_the_changelog_keeps_its_own_rules():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n\n<!--\n")
    assert "\n## [Unreleased]\n" in text
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    assert [kind for kind in order if kind in kinds] == list(dict.fromkeys(kinds))
    known = {option.name for option in OPTIONS} | {name[2:] for name in help_of_submit()}
    assert not [name for name in re.findall(r"`--([a-z0-9-]+)", text) if name not in known]


def test_what_is_said_to_be_missing_is_missing():
    missing = {option.missing for option in OPTIONS}
    sentence = (ROOT / "README.md").read_text().split("Not there yet")[1].split(".")[0]
    capabilities = {
        "encrypted messages": "encryption",
        "signed": "signing",
        "ConfigMap": "the Kubernetes ConfigMap",
    }
    for word, capability in {"SQS": "SQS", "Pub/Sub": "Pub/Sub", **capabilities}.items():
        assert (word in sentence) == (capability in missing), word
