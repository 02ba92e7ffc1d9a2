"""What `doctor` looks at. Each check gives findings and raises nothing; the slow ones run beside each other, with a limit."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from runner import __version__, errors
from runner.cli import machine, parts
from runner.cli.finding import Finding, unusable
from runner.client.message import Storage
from runner.credentials import directory
from runner.credentials.accounts import Account, QueueDirectory, Rabbitmq
from runner.experiment.record import metadata_store
from runner.process.spawner import Spawner
from runner.storage.base import Credentials, Forbidden, Location, NotFound
from runner.storage.registry import Stores

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable

    from runner.config import Config
    from runner.queues.base import QueueInfo

#: How long an account or a store may take to answer.
ANSWER_SECS = 20.0
_SHOWN_QUEUES = 5
_NO_OBJECT = "studio-runner-doctor"


async def examine(config: Config, stores: Iterable[str]) -> list[Finding]:
    """All checks, in the order in which one would look. Starts the parent of runs for as long as it lasts."""
    spawner = Spawner()
    await spawner.open()
    try:
        checks: list[Coroutine[Any, Any, list[Finding]]] = [
            asyncio.to_thread(_program),
            asyncio.to_thread(_directories, config),
            asyncio.to_thread(machine.machine, config),
            asyncio.to_thread(machine.limits, config),
            asyncio.to_thread(machine.gpus, config),
            machine.containers(config, spawner),
            machine.interpreters(config, spawner),
            _accounts(config),
            *[_store(config, functools.partial(_place, url)) for url in stores],
        ]
        if config.runs.metadata_store is not None:
            checks.append(_store(config, functools.partial(metadata_store, config), "--metadata-store"))
        groups = await asyncio.gather(*checks)
    finally:
        await spawner.aclose()
    return [finding for group in groups for finding in group]


def _program() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    return [
        Finding(
            subject="studio-runner",
            verdict="ok",
            text=f"{__version__} on Python {version}",
            facts={"version": __version__, "python": version},
        )
    ]


def _directories(config: Config) -> list[Finding]:
    named = {"--working-dir": config.paths.working_dir, "--state-dir": config.paths.state_dir}
    if config.cache.directory is not None:
        named["--cache-dir"] = config.cache.directory
    return [_directory(option, path) for option, path in named.items()]


def _directory(option: str, path: Path) -> Finding:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    facts = {"path": str(path)}
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"studio-runner")
    except OSError as exc:
        return Finding(
            subject=option,
            verdict="problem",
            text=f"{path}: {there} cannot be written: {exc.strerror}",
            advice=f"give user {os.geteuid()} a directory of its own, or name another with {option}",
            facts=facts,
        )
    if there == path and path.stat().st_uid != os.geteuid() and option != "--working-dir":
        return Finding(
            subject=option,
            verdict="problem",
            text=f"{path}: belongs to user {path.stat().st_uid}, not to {os.geteuid()}",
            advice=f"name a directory of your own with {option}",
            facts=facts,
        )
    made = "" if there == path else ", will be made"
    return Finding(subject=option, verdict="ok", text=f"{path}: can be written{made}", facts=facts)


async def _accounts(config: Config) -> list[Finding]:
    """Those that options name, and those in directories of credentials."""
    accounts = list(parts.named(config))
    findings: list[Finding] = []
    for path, prefix in config.queues.certs:
        try:
            found = await asyncio.to_thread(directory.scan, path, prefix)
        except errors.UsageError as exc:
            findings.append(unusable(f"directory {path}", str(exc)))
            continue
        accounts += found.accounts.values()
        findings += [unusable(f"account {name}", why) for name, why in found.problems.items()]
        if not found.accounts and not found.problems:
            findings.append(
                Finding(
                    subject=f"directory {path}",
                    verdict="warning",
                    text="holds no credentials",
                    advice="put a file with an amqp:// URL, a service account's JSON, or AWS's credentials and config there",
                )
            )
    answers = await asyncio.gather(*[_account(config, account) for account in accounts])
    return findings + [finding for group in answers for finding in group]


async def _account(config: Config, account: Account) -> list[Finding]:
    embedded = config.paths.working_dir / "queue"
    if isinstance(account, QueueDirectory) and account.root == embedded and not embedded.exists():
        return [
            Finding(
                subject=f"account {account.label}", verdict="ok", text=f"{embedded} will be made, for queues"
            )
        ]
    findings = _habits(account) if isinstance(account, Rabbitmq) else []
    try:
        async with _asked(config, account) as (label, queues):
            taken = sorted(str(queue.ref) for queue in queues if _matches(config, account, queue.ref.name))
    except errors.UsageError as exc:
        return [unusable(f"account {account.label}", str(exc)), *findings]
    except errors.QueueUnavailable as exc:
        return [_away(account.label, str(exc)), *findings]
    except TimeoutError:
        return [_away(account.label, f"no answer in {ANSWER_SECS:.0f} s"), *findings]
    subject, facts = f"account {label}", {"queues": len(queues), "taken": len(taken)}
    if not queues:
        told = Finding(subject=subject, verdict="ok", text="answers; it has no queue yet", facts=facts)
    elif not taken:
        told = Finding(
            subject=subject,
            verdict="warning",
            text=f"answers; none of its {len(queues)} queues matches {config.queues.match.pattern!r}",
            advice="queues are chosen by --queue-match and --queue-mismatch",
            facts=facts,
        )
    else:
        more = ", ..." if len(taken) > _SHOWN_QUEUES else ""
        told = Finding(
            subject=subject,
            verdict="ok",
            text=f"answers; work is taken from {len(taken)} of {len(queues)} queues: {', '.join(taken[:_SHOWN_QUEUES])}{more}",
            facts=facts,
        )
    return [told, *findings]


@contextlib.asynccontextmanager
async def _asked(config: Config, account: Account) -> AsyncIterator[tuple[str, list[QueueInfo]]]:
    """Its label and its queues, asked once. Raises UsageError, QueueUnavailable, TimeoutError."""
    backend = parts.backend(config, account)
    await backend.open()
    try:
        async with asyncio.timeout(ANSWER_SECS):
            queues = await backend.discover()
        yield backend.account, queues
    finally:
        await backend.aclose()


def _matches(config: Config, account: Account, name: str) -> bool:
    patterns = [(config.queues.match, config.queues.mismatch)]
    if isinstance(account, Rabbitmq):
        patterns.append((account.match or config.queues.match, account.mismatch))
    return all(
        match.search(name) is not None and not (mismatch is not None and mismatch.search(name) is not None)
        for match, mismatch in patterns
    )


def _away(label: str, why: str) -> Finding:
    return Finding(
        subject=f"account {label}",
        verdict="problem",
        text=f"does not answer: {why}",
        advice="check the address, the credentials and the network; the daemon goes on trying",
    )


def _habits(account: Rabbitmq) -> list[Finding]:
    """What works, and is asking for trouble."""
    try:
        url = urlsplit(account.url)
        host, user = url.hostname or "localhost", url.username or "guest"
    except ValueError:
        return []  # refused by the backend, with the reason
    subject = f"account {account.label or host}"
    found = []
    if (user, url.password or "guest") == ("guest", "guest"):
        found.append(
            Finding(
                subject=subject,
                verdict="warning",
                text="is used as guest with the password guest, which everybody knows",
                advice="make a user of its own: rabbitmqctl add_user, set_permissions; then rabbitmqctl delete_user guest",
            )
        )
    if url.scheme == "amqp" and host not in {"localhost", "127.0.0.1", "::1"}:
        found.append(
            Finding(
                subject=subject,
                verdict="warning",
                text=f"is spoken to without TLS: {host} is another machine, and messages carry storage credentials",
                advice="use amqps:// where that network is not trusted",
            )
        )
    return found


async def _store(config: Config, place_of: Callable[[], Location], named: str = "store") -> list[Finding]:
    stores = Stores(config.s3)
    try:
        place = place_of()
        told = await asyncio.to_thread(_ask_store, stores, place)
    except errors.RunnerError as exc:
        return [unusable(named, str(exc))]
    finally:
        stores.close()
    return [dataclasses.replace(told, subject=f"{named} {place.uri.rstrip('/')}")]


def _place(url: str) -> Location:
    """Raises errors.UsageError."""
    storage = Storage.parse(url, Path.cwd())
    if storage.type == "local":
        return Location(scheme="file", bucket=f"{storage.endpoint.rstrip('/')}/{storage.bucket}")
    scheme, _, host = storage.endpoint.partition("://")
    env = os.environ
    keys = None
    if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        keys = Credentials(
            access_key=env["AWS_ACCESS_KEY_ID"],
            secret_key=env["AWS_SECRET_ACCESS_KEY"],
            session_token=env.get("AWS_SESSION_TOKEN"),
        )
    return Location(
        scheme="s3",
        endpoint=host,
        tls=scheme == "https",
        bucket=storage.bucket,
        region=env.get("AWS_DEFAULT_REGION"),
        credentials=keys,
    )


def _local_store(path: Path) -> Finding:
    if not path.is_dir():
        return Finding(
            subject="",
            verdict="warning",
            text="is not there",
            advice="it is made when something is first stored there; is it mounted?",
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Finding(
            subject="",
            verdict="problem",
            text=f"cannot be read and written by user {os.geteuid()}",
            advice="experiments that keep their results there need both",
        )
    return Finding(subject="", verdict="ok", text="can be read and written")


def _ask_store(stores: Stores, place: Location) -> Finding:
    """Ask for objects that are not there: the answer tells whether the bucket and the credentials are good."""
    whose = "the credentials of AWS_ACCESS_KEY_ID" if place.credentials else "anybody"
    if place.scheme == "file":
        return _local_store(Path(place.bucket))
    try:
        store = stores.store(place)
        try:
            next(store.list(_NO_OBJECT), None)
        except Forbidden:  # one may be let read what one may not list
            with contextlib.suppress(NotFound):
                store.stat(_NO_OBJECT)
    except NotFound:
        return Finding(
            subject="",
            verdict="problem",
            text=f"answers; it has no bucket {place.bucket!r}",
            advice="make the bucket, or correct the name",
        )
    except Forbidden as exc:
        return Finding(
            subject="",
            verdict="problem" if place.credentials else "warning",
            text=f"answers; it does not let {whose} read: {exc}",
            advice="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; experiments bring their own",
        )
    except errors.StorageUnavailable as exc:
        return Finding(
            subject="",
            verdict="problem",
            text=f"does not answer: {exc}",
            advice="check the address and the network; runs that need it pause their queues until it answers",
        )
    return Finding(subject="", verdict="ok", text=f"answers, and lets {whose} read")
