from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import config, errors
from runner.options import OPTIONS

BUILT = [option for option in OPTIONS if not option.missing]
MISSING = [option for option in OPTIONS if option.missing]

#: A value of each option that is not its default, and the field that it must reach.
REACHES = {
    "queue-match": ("x_.*", "queues.match"),
    "queue-mismatch": ("y", "queues.mismatch"),
    "queue-refresh": ("1m", "queues.refresh_secs"),
    "amqp-url": ("amqp://h/", "queues.amqp_url"),
    "amqp-mgt-url": ("http://h:15672", "queues.amqp_management_url"),
    "queue-root": ("/q", "queues.root"),
    "working-dir": ("/w", "paths.working_dir"),
    "state-dir": ("/s", "paths.state_dir"),
    "debug": ("true", "paths.keep_runs"),
    "cpu-only": ("true", "machine.cpu_only"),
    "gpu-cards": ("/cards.toml", "machine.gpu_cards"),
    "max-cores": ("3", "machine.max_cores"),
    "max-mem": ("3gb", "machine.max_mem_bytes"),
    "max-disk": ("3gb", "machine.max_disk_bytes"),
    "cache-dir": ("/c", "cache.directory"),
    "cache-size": ("1gb", "cache.size_bytes"),
    "cache-create": ("true", "cache.temporary"),
    "s3-ca": ("/ca", "s3.ca"),
    "s3-cert": ("/cert", "s3.cert"),
    "s3-key": ("/key", "s3.key"),
    "allow-env-secrets": ("false", "runs.allow_env_secrets"),
    "allow-image": ("docker://x/*,artifact:", "images.allowed"),
    "image-cache-size": ("1gb", "images.cache_bytes"),
    "env-cache-size": ("1gb", "environments.cache_bytes"),
    "python-fallback": ("true", "environments.fallback"),
    "container-engine": ("/usr/bin/podman", "containers.engine"),
    "container-network": ("none", "containers.network"),
    "container-pull": ("never", "containers.pull"),
    "retries": ("2", "runs.retries"),
    "enforce-limits": ("false", "runs.enforce_limits"),
    "run-as": ("nobody", "runs.run_as"),
    "metadata-schema": ("0.14", "runs.metadata_schema"),
    "metadata-store": ("s3://h/b", "runs.metadata_store"),
    "grace": ("10m", "runs.grace_secs"),
    "limit-tasks": ("7", "limits.tasks"),
    "limit-idle-duration": ("1h", "limits.idle_secs"),
    "limit-interval": ("1m", "limits.interval_secs"),
    "rmq-lease": ("90", "queues.rmq_lease"),
    "certs-dir": ("/certs", "queues.certs"),
    "sqs-certs": ("/certs", "queues.certs"),
    "google-certs": ("/certs", "queues.certs"),
    "aws-ambient": ("true", "queues.aws_ambient"),
    "aws-region": ("eu-west-1", "queues.aws_region"),
    "sqs-timeout": ("3s", "queues.sqs_timeout_secs"),
    "pubsub-timeout": ("3s", "queues.pubsub_timeout_secs"),
    "prom-address": ("h:1", "http.port"),
    "http-token": ("t0ken", "http.token"),
    "log-level": ("debug", "logs.level"),
    "log-format": ("json", "logs.format"),
}
#: What an option needs beside it, to be accepted.
BESIDE = {
    "cache-dir": ["--cache-size=2gb"],
    "cache-size": ["--cache-dir=/d"],
    "cache-create": ["--cache-dir=/d", "--cache-size=2gb"],
    "s3-cert": ["--s3-key=/k"],
    "s3-key": ["--s3-cert=/c"],
}


def field(built, path):
    part, name = path.split(".")
    return getattr(getattr(built, part), name)


def refusal(argv=(), environ=None):
    with pytest.raises(errors.UsageError) as caught:
        config.parse(argv, environ or {})
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_every_option_is_in_the_table_of_this_test():
    assert {option.name for option in BUILT} == set(REACHES)


@pytest.mark.parametrize("name", REACHES)
def test_every_option_reaches_its_field_as_argument_and_as_variable(name):
    text, path = REACHES[name]
    beside = BESIDE.get(name, [])
    plain = field(config.parse([], {}), path)
    as_argument = field(config.parse([*beside, f"--{name}={text}"], {}), path)
    assert as_argument != plain
    variable = next(option.env for option in OPTIONS if option.name == name)
    if variable:
        assert field(config.parse(beside, {variable: text}), path) == as_argument


def test_defaults():
    built = config.parse([], {})
    assert built.queues.match.pattern == r"^(rmq|sqs|local|pubsub)_.*$"
    assert (built.queues.refresh_secs, built.queues.mismatch, built.queues.root) == (
        10,
        None,
        Path("/tmp/queue"),
    )
    assert built.paths == config.Paths(working_dir=Path("/tmp"), state_dir=Path("/tmp/state"))
    assert built.environments.cache_dir == Path("/tmp/state/environments")
    assert (built.http, built.logs, built.limits) == (config.Http(), config.Logs(), config.Limits())
    assert (built.runs, built.cache, built.machine) == (
        config.Runs(),
        config.ArtifactCache(),
        config.Machine(),
    )


def test_working_and_state_directories_follow_the_environment():
    environ = {"TMPDIR": "/var/tmp", "STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}
    assert config.parse([], environ).paths == config.Paths(
        working_dir=Path("/var/tmp"), state_dir=Path("/var/lib/a")
    )
    paths = config.parse(["--working-dir=w", "--state-dir", "s"], environ, cwd=Path("/home/me")).paths
    assert (paths.working_dir, paths.state_dir) == (Path("/home/me/w"), Path("/home/me/s"))


def test_the_directory_queue_is_the_default_only_without_other_queues():
    assert config.parse(["--working-dir=/w"], {}).queues.root == Path("/w/queue")
    assert config.parse(["--amqp-url=amqp://h"], {}).queues.root is None
    both = config.parse(["--amqp-url=amqp://h", "--queue-root=/q"], {}).queues
    assert both.root == Path("/q")


@pytest.mark.parametrize(
    "argv",
    [
        ["-max-cores", "3"],
        ["-max-cores=3"],
        ["--max-cores", "3"],
        ["--max-cores=3"],
        ["--max-cores=1", "-max-cores", "3"],  # the last one counts
    ],
)
def test_spellings(argv):
    assert config.parse(argv, {"MAX_CORES": "9"}).machine.max_cores == 3


@pytest.mark.parametrize(
    "spelling", ["-debug", "--debug", "--debug=1", "-debug=T", "--debug=TRUE", "-debug=yes"]
)
def test_booleans_that_are_true(spelling):
    assert config.parse([spelling, "-max-cores", "3"], {}).paths.keep_runs


@pytest.mark.parametrize("spelling", ["--debug=false", "-debug=0", "--debug=F"])
def test_booleans_that_are_false(spelling):
    assert not config.parse([spelling], {"DEBUG": "true"}).paths.keep_runs


def test_an_empty_variable_is_not_set_and_unknown_ones_are_none_of_ours():
    environ = {option.env: "" for option in OPTIONS if option.env}
    environ |= {"AWS_REGION": "eu-west-1", "MESSAGE_CRYPT": "x", "UNKNOWN": "y"}
    assert config.parse([], environ) == config.parse([], {})


def test_an_empty_argument_switches_off():
    built = config.parse(["--amqp-url=", "--queue-mismatch=", "--sqs-certs="], {"AMQP_URL": "amqp://h"})
    assert built.queues.amqp_url is None


def test_variables_in_urls_are_expanded():
    environ = {
        "AMQP_URL": "amqp://${USER_1}:${PASSWORD}@h:${PORT}/%2f",
        "USER_1": "u",
        "PASSWORD": "$p",
        "PORT": "5",
    }
    assert config.parse([], environ).queues.amqp_url == "amqp://u:$p@h:5/%2f"
    del environ["PASSWORD"]
    assert "no variable PASSWORD" in refusal([], environ)
    assert config.parse(["--queue-match=${X}"], {}).queues.match.pattern == "${X}"  # nothing else is


def test_a_newline_at_the_end_of_a_secret_file_does_no_harm():
    built = config.parse([], {"AMQP_URL": "amqp://u:p@h/\n", "HTTP_TOKEN": "t0ken\n"})
    assert (built.queues.amqp_url, built.http.token) == ("amqp://u:p@h/", "t0ken")


def test_addresses():
    def address(text):
        http = config.parse([f"--prom-address={text}"], {}).http
        return http.host, http.port

    assert [address(text) for text in (":9090", "localhost:0", "[::1]:80", "0.0.0.0:1")] == [
        ("", 9090),
        ("localhost", 0),
        ("::1", 80),
        ("0.0.0.0", 1),
    ]


def test_nothing_is_looked_at_more_often_than_makes_sense():
    built = config.parse(["--limit-interval=1ms", "--queue-refresh=0"], {})
    assert built.limits.interval_secs == config.MIN_INTERVAL_SECS
    assert built.queues.refresh_secs == config.MIN_REFRESH_SECS


def test_the_references_config_map_starts_unchanged():
    environ = {"LOGXI": "*=DBG", "LOGXI_FORMAT": "happy,maxcol=1024", "QUEUE_MATCH": "^(rmq|sqs)_.*$"}
    built = config.parse([], environ)
    assert built.logs == config.Logs(level="debug", format="console", width=1024)
    assert built.queues.match.pattern == "^(rmq|sqs)_.*$"


@pytest.mark.parametrize(
    ("logxi", "style", "expected"),
    [
        ("*=INF", "JSON", ("info", "json", None)),
        ("*=WRN,-models", "text", ("warning", "console", None)),
        ("dat:sqlx=DBG,*=ERR", "JSON,t=2006-01-02", ("error", "json", None)),
        ("*", "maxcol=80", ("debug", "auto", 80)),
        ("models=DBG", "strange,maxcol=x", ("info", "auto", None)),
        ("*=trc", "happy,context=2", ("debug", "console", None)),
    ],
)
def test_logxi(logxi, style, expected):
    logs = config.parse([], {"LOGXI": logxi, "LOGXI_FORMAT": style}).logs
    assert (logs.level, logs.format, logs.width) == expected


def test_options_win_over_logxi():
    environ = {"LOGXI": "*=DBG", "LOGXI_FORMAT": "happy,maxcol=100", "LOG_LEVEL": "WARN"}
    logs = config.parse(["--log-format=json"], environ).logs
    assert (logs.level, logs.format) == ("warning", "json")


@pytest.mark.parametrize(
    ("argv", "environ", "starts"),
    [
        (["--queue-match=["], {}, "--queue-match=[: not a regular expression"),
        ([], {"QUEUE_MATCH": "("}, "QUEUE_MATCH=(: not a regular expression"),
        (["--queue-match="], {}, "--queue-match: empty"),
        (["-max-mem", "lots"], {}, "--max-mem=lots: not a size"),
        ([], {"MAX_MEM": "-3gb"}, "MAX_MEM=-3gb: not a size"),
        (["--grace=soon"], {}, "--grace=soon: not a duration"),
        (["--grace=-1s"], {}, "--grace=-1s: a negative duration"),
        (["--max-cores=-1"], {}, "--max-cores=-1: not a whole number"),
        (["--max-cores=1.5"], {}, "--max-cores=1.5: not a whole number"),
        ([], {"DEBUG": "app:*"}, "DEBUG=app:*: neither true nor false"),
        (["--log-level=loud"], {}, "--log-level=loud: none of debug, info"),
        (["--metadata-schema=2"], {}, "--metadata-schema=2: none of 1.0, 0.14"),
        (["--metadata-store=bucket"], {}, "--metadata-store=bucket: not the URI"),
        (["--prom-address=9090"], {}, "--prom-address=9090: not host:port"),
        (["--prom-address=:99999"], {}, "--prom-address=:99999: not host:port"),
        (["--prom-address=::1:80"], {}, "--prom-address=::1:80: not host:port"),
        (["--cache-dir=/c"], {}, "--cache-dir=/c: a cache needs a size"),
        (["--cache-dir=/c", "--cache-size=99mb"], {}, "--cache-size=99mb: less than 100 MB"),
        (["--s3-cert=/c"], {}, "--s3-cert=/c: a certificate and its key go together: give --s3-key"),
        ([], {"S3_KEY": "/k"}, "S3_KEY=/k: a certificate and its key go together: give --s3-cert"),
        (["--max-mem"], {}, "--max-mem: a value is missing"),
        (["--max-men=3"], {}, "unknown option --max-men: do you mean --max-mem?"),
        (["--xyzzy=3"], {}, "unknown option --xyzzy: --help lists them"),
        (["submit"], {}, "unexpected argument submit"),
        (["--debug", "false"], {}, "unexpected argument false"),
        (["--"], {}, "unexpected argument --"),
        (["-"], {}, "unexpected argument -"),
        (["--=3"], {}, "unexpected argument"),
        (["--queue-match=a\nb["], {}, "--queue-match='a\\nb['"),
        ([], {"LOGXI": "*=LOUD"}, "LOGXI=*=LOUD: no level is called LOUD"),
        (["--metadata-store=://u:canary@h"], {}, "--metadata-store=://***@h"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_says_which_and_why(argv, environ, starts):
    text = refusal(argv, environ)
    assert text.startswith(starts)
    assert "(example: " in text or "option" in starts or "argument" in starts


@pytest.mark.parametrize(
    "url",
    [
        "http://u:canary@h",
        "amqp://u:can/ary@h",
        "amqp://u:canary@",
        "amqp://u:canary@h:canary/",
        "amqp://[canary",
        "canary",
        "amqp://u:canary@h/${NOWHERE}",
    ],
)
def test_a_wrong_secret_is_refused_without_being_shown(url):
    text = refusal(["-amqp-url", url])
    assert text.startswith("--amqp-url=***: ")
    assert "canary" not in text
    assert "canary" not in refusal([], {"HTTP_TOKEN": "can ary canary"})


def test_a_configuration_does_not_show_its_secrets():
    built = config.parse(
        [], {"AMQP_URL": "amqp://u:canary@h", "HTTP_TOKEN": "canary", "AMQP_MGT_URL": "http://u:canary@h"}
    )
    assert "canary" not in repr(built)


@pytest.mark.parametrize("option", MISSING, ids=lambda option: option.name)
def test_options_of_what_is_not_built_yet_are_refused(option):
    value = {"BOOL": str(option.accepted != ("true",)).lower(), "DURATION": "7s"}.get(
        option.kind.metavar, "x"
    )
    assert refusal([f"--{option.name}={value}"]).startswith(f"--{option.name}: ")
    if option.env:
        text = refusal([], {option.env: value})
        assert text.startswith(f"{option.env}: ")
        assert "not built yet" in text


@pytest.mark.parametrize(
    "option", [option for option in MISSING if option.accepted], ids=lambda option: option.name
)
def test_but_accepted_when_they_ask_for_what_is_done_anyway(option):
    for text in option.accepted:
        assert config.parse([f"--{option.name}={text}"], {}) == config.parse([], {})


def test_the_table_is_sound():
    names = [option.name for option in OPTIONS]
    assert len(set(names)) == len(names)
    for option in OPTIONS:
        assert option.group
        assert option.help
        if option.default:
            option.kind.parse(option.default)
        example = (option.example or option.kind.example).strip("'")
        if "$" not in example:
            option.kind.parse(example)


def refused(argv, environ):
    """The text of the refusal; None when it is accepted."""
    try:
        assert dataclasses.is_dataclass(config.parse(argv, environ))
    except errors.UsageError as exc:
        return str(exc)
    return None


@given(
    st.lists(st.text(max_size=20) | st.sampled_from([f"--{option.name}" for option in OPTIONS]), max_size=5)
)
def test_any_command_line_gives_a_configuration_or_one_line(argv):
    assert len((refused(argv, {}) or "fine").splitlines()) == 1


@given(st.sampled_from([option for option in OPTIONS if option.env]), st.text(max_size=30))
def test_any_value_does_too(option, text):
    why = refused([], {option.env: text})
    assert why is None or (why.startswith(option.env) and len(why.splitlines()) == 1)
