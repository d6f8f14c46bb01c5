"""Settings are read once, and what is wrong with them is told by name, all at once and without a secret."""

import ssl
from collections.abc import Mapping
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from config.settings import (
    LATER,
    SETTINGS,
    KafkaSettings,
    Settings,
    SettingsError,
    parse_bytes,
    parse_duration_s,
    settings_page,
    show_bytes,
    show_duration,
)

BOOTSTRAP = {"HEADGATE_KAFKA_BOOTSTRAP": "localhost:9092"}
ROOT = Path(__file__).parents[2]


def load(**values: str) -> Settings:
    return Settings.load(BOOTSTRAP | {f"HEADGATE_{name}": value for name, value in values.items()})


def problems(env: Mapping[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(env)
    return caught.value.problems


def refused(**values: str) -> str:
    """The one problem with these."""
    (problem,) = problems(BOOTSTRAP | {f"HEADGATE_{name}": value for name, value in values.items()})
    return problem


# ---------------------------------------------------------------- values


def test_the_brokers_alone_are_required() -> None:
    settings = Settings.load(BOOTSTRAP)
    assert settings.vendors == ("default",)
    assert settings.topics.control == "headgate.control"
    assert settings.sizes.retry_tiers_s == (1, 5, 30, 300, 1800, 7200, 36000)
    assert settings.sizes.max_event_bytes == 1024 * 1024
    assert settings.sizes.dlq_retention_ms == 30 * 86_400_000
    assert settings.sizes.longest_max_age_ms == 96 * 3_600_000
    assert (settings.redis.dedupe_ttl_s, settings.redis.ledger_ttl_s) == (86_400, 7 * 86_400)
    assert (settings.redis.deadline_s, settings.redis.off_s) == (0.05, 1)
    assert (settings.tenants.default_topics, settings.tenants.pools) == ("own", 16)
    worker = settings.worker
    assert (worker.id, worker.in_flight, worker.memory_budget_bytes) == (None, 512, 256 * 2**20)
    assert (worker.commit_interval_s, worker.shutdown_timeout_s, worker.http_port) == (0.5, 30, 8080)
    assert (worker.tenant_label, worker.type_label) == ("tag", False)
    assert settings.egress_allow == ()
    assert (settings.env, settings.log.format, settings.replication_factor) == ("development", "console", 1)
    assert settings.warnings == ()


def test_every_value_reaches_its_group() -> None:
    settings = load(
        PREFIX="hg2",
        VENDORS="north, south",
        INGRESS_PARTITIONS="48",
        DEFAULT_TOPICS="pooled",
        POOLS="4",
        RETRY_TIERS="500ms,1m",
        MAX_EVENT_BYTES="2MiB",
        REPLICATION_FACTOR="3",
        INGRESS_RETENTION="1d",
        ATTEMPTS_RETENTION="2d",
        DLQ_RETENTION="3d",
        REDIS_URL="redis://:pw@r:6380/3",
        DEDUPE_TTL="1h",
        LEDGER_TTL="2h",
        WORKER_ID="headgate-0",
        IN_FLIGHT="7",
        MEMORY_BUDGET="64MiB",
        COMMIT_INTERVAL="250ms",
        SHUTDOWN_TIMEOUT="5s",
        HTTP_PORT="0",
        TENANT_LABEL="none",
        TYPE_LABEL="on",
        EGRESS_ALLOW="10.0.0.0/8, ::1/128",
        LOG_FORMAT="json",
        LOG_LEVEL="debug",
        DEV_DIR="/tmp/x",
    )
    assert settings.topics.ingress(settings.vendors[1]) == "hg2.south.ingress"
    sizes = settings.sizes
    assert (sizes.ingress_partitions, sizes.retry_tiers_s, sizes.max_event_bytes) == (48, (0.5, 60), 2 * 2**20)
    assert (sizes.ingress_retention_ms, sizes.attempts_retention_ms, sizes.dlq_retention_ms) == tuple(
        days * 86_400_000 for days in (1, 2, 3)
    )
    assert (settings.tenants.default_topics, settings.tenants.pools) == ("pooled", 4)
    assert settings.redis.url == "redis://:pw@r:6380/3"
    assert (settings.redis.dedupe_ttl_s, settings.redis.ledger_ttl_s) == (3600, 7200)
    worker = settings.worker
    assert (worker.id, worker.in_flight, worker.memory_budget_bytes) == ("headgate-0", 7, 64 * 2**20)
    assert (worker.commit_interval_s, worker.shutdown_timeout_s, worker.http_port) == (0.25, 5, 0)
    assert (worker.tenant_label, worker.type_label) == ("none", True)
    assert [str(network) for network in settings.egress_allow] == ["10.0.0.0/8", "::1/128"]
    assert (settings.log.format, settings.log.level) == ("json", "debug")
    assert (settings.replication_factor, settings.dev_dir) == (3, Path("/tmp/x"))


def test_an_empty_value_counts_as_none() -> None:
    assert Settings.load(dict.fromkeys(SETTINGS, "") | BOOTSTRAP) == Settings.load(BOOTSTRAP)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("KAFKA_BOOTSTRAP", "localhost", "host:port"),
        ("KAFKA_BOOTSTRAP", "localhost:99999", "host:port"),
        ("KAFKA_BOOTSTRAP", "kafka://localhost:9092", "host:port"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS", "SASL_SSL"),
        ("KAFKA_SASL_MECHANISM", "GSSAPI", "SCRAM-SHA-512"),
        ("KAFKA_CA_FILE", "/nowhere/ca.pem", "No such file"),
        ("MASTER_KEY_FILE", "/nowhere/master.key", "No such file"),
        ("PREFIX", "head.gate", "must match"),
        ("PREFIX", "Headgate", "must match"),
        ("VENDORS", "a,A", "must match"),
        ("VENDORS", "a,keys", "reserved"),
        ("VENDORS", "a,a", "twice"),
        ("VENDORS", ",", "names no vendor"),
        ("INGRESS_PARTITIONS", "0", "from 1 to"),
        ("POOLS", "many", "whole number"),
        ("POOLS", "-1", "whole number"),
        ("POOLS", "1.5", "whole number"),
        ("DEFAULT_TOPICS", "shared", "own, pooled"),
        ("RETRY_TIERS", "5s,30s", "at most 1s"),
        ("RETRY_TIERS", "1s,30s,5s", "ascending"),
        ("RETRY_TIERS", "1s,1s", "ascending"),
        ("RETRY_TIERS", "0s,5s", "at most 1s"),
        ("RETRY_TIERS", "1s,five", "not a duration"),
        ("RETRY_TIERS", ",", "1 to 32"),
        ("MAX_EVENT_BYTES", "1Mb", "not a size"),
        ("MAX_EVENT_BYTES", "1GiB", "to 32MiB"),
        ("REPLICATION_FACTOR", "0", "from 1 to 9"),
        ("DEDUPE_TTL", "24", "not a duration"),
        ("DLQ_RETENTION", "1s", "from 1h"),
        ("COMMIT_INTERVAL", "0s", "from 50ms"),
        ("IN_FLIGHT", "0", "from 1 to"),
        ("MEMORY_BUDGET", "1MiB", "from 8MiB"),
        ("SHUTDOWN_TIMEOUT", "31s", "to 30s"),
        ("EGRESS_ALLOW", "10.0.0.1/8", "host bits"),
        ("EGRESS_ALLOW", "intranet", "CIDRs"),
        ("WORKER_ID", "a b", "a pod's name"),
        ("HTTP_PORT", "65536", "to 65535"),
        ("TENANT_LABEL", "slug", "tag, tenant, none"),
        ("TYPE_LABEL", "maybe", "neither on nor off"),
        ("LOG_FORMAT", "xml", "console, json"),
        ("LOG_LEVEL", "verbose", "debug, info"),
        ("ENV", "prod", "development, production"),
    ],
)
def test_a_wrong_value_is_refused_by_name_value_and_remedy(name: str, value: str, part: str) -> None:
    (problem,) = problems(BOOTSTRAP | {f"HEADGATE_{name}": value})
    assert problem.startswith(f"HEADGATE_{name}={value!r}: ")
    assert part in problem


def test_all_problems_are_told_at_once() -> None:
    told = problems({"HEADGATE_POOLS": "x", "HEADGATE_IN_FLIGHT": "y", "HEADGATE_POSTGRES_DSN": "postgres://u:pw@h/d"})
    assert [problem.split("=")[0].split(":")[0].split()[0] for problem in told] == [
        "HEADGATE_KAFKA_BOOTSTRAP",
        "HEADGATE_POOLS",
        "HEADGATE_IN_FLIGHT",
        "HEADGATE_POSTGRES_DSN",
    ]


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "values",
    [
        {"KAFKA_SASL_PASSWORD": "canary"},
        {"REDIS_URL": "http://:canary@redis:6379/0"},
        {"REDIS_URL": "redis://:canary@redis:x/0"},
        {"REDIS_URL": "redis://:canary@redis:6379/canary"},
        {"MASTER_KEY": "canary", "MASTER_KEY_FILE": "/dev/null"},
        {"POSTGRES_DSN": "postgres://u:canary@h/d"},
        {"SCHEMA_REGISTRY_URL": "http://u:canary@h"},
        {"SCHEMA_REGISTRY_PASSWORD": "canary"},
        {"ENV": "production", "REDIS_URL": "redis://:canary@redis:6379/0"},
    ],
)
def test_no_problem_quotes_a_secret(values: dict[str, str]) -> None:
    told = problems(BOOTSTRAP | {f"HEADGATE_{name}": value for name, value in values.items()})
    assert told
    assert not [problem for problem in told if "canary" in problem]


def test_settings_show_no_secret() -> None:
    settings = load(
        KAFKA_SECURITY_PROTOCOL="SASL_SSL",
        KAFKA_SASL_MECHANISM="SCRAM-SHA-512",
        KAFKA_SASL_USERNAME="headgate",
        KAFKA_SASL_PASSWORD="canary",
        REDIS_URL="redis://:canary@redis:6379/0",
        MASTER_KEY="k1:canary",
    )
    assert "canary" not in repr(settings)
    assert "canary" not in str(settings)
    assert settings.redis.shown == "redis://redis:6379/0"
    assert settings.kafka.confluent()["sasl.password"] == "canary"  # the control: it is there where it is needed


# ---------------------------------------------------------------- names


def test_an_unknown_name_warns_with_the_nearest() -> None:
    (warning,) = load(RETRY_TIRES="1s").warnings
    assert warning == "HEADGATE_RETRY_TIRES is not a setting and does nothing; did you mean HEADGATE_RETRY_TIERS?"


def test_names_of_our_tools_and_of_kubernetes_do_not_warn() -> None:
    settings = load(
        DEV_S3_URL="http://x",
        TEST_STACK_DIR="/x",
        CACHE_DIR="/x",
        BENCH_EVENTS="1",
        SERVICE_HOST="10.0.0.1",
        SERVICE_PORT="80",
        SERVICE_PORT_HTTP="80",
        PORT="tcp://10.0.0.1:80",
        PORT_80_TCP="tcp://10.0.0.1:80",
        WORKER_SERVICE_HOST="10.0.0.1",
    )
    assert settings.warnings == ()


@pytest.mark.parametrize("name", LATER)
def test_what_comes_later_is_refused_as_such(name: str) -> None:
    assert "arrives with a later release" in refused(**{name: "http://x"})


# ---------------------------------------------------------------- BigQuery


def test_bigquery_is_google_s_own_until_the_operator_names_another() -> None:
    assert load().bigquery.place == ("https://bigquery.googleapis.com", "bigquerystorage.googleapis.com:443")
    assert load().bigquery.default_credentials is False
    found = load(BIGQUERY_ENDPOINT="http://127.0.0.1:9050/,127.0.0.1:9060", BIGQUERY_DEFAULT_CREDENTIALS="on").bigquery
    assert found.place == ("http://127.0.0.1:9050", "127.0.0.1:9060")
    assert (found.place.encrypted, found.default_credentials) == (False, True)


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:9050", "127.0.0.1:9050,127.0.0.1:9060", "http://a,b:1,c:2", "http://a,b"]
)
def test_an_endpoint_of_bigquery_that_is_none_is_refused(text: str) -> None:
    assert "write https://bigquery.acme.example,bigquery.acme.example:443" in refused(BIGQUERY_ENDPOINT=text)


# ---------------------------------------------------------------- the schema registry


def test_a_schema_registry_has_an_address_and_both_or_neither_of_user_and_password() -> None:
    assert load().schema_registry is None
    found = load(
        SCHEMA_REGISTRY_URL="HTTPS://registry/apis/ccompat/v7/",
        SCHEMA_REGISTRY_USER="reader",
        SCHEMA_REGISTRY_PASSWORD="canary-4e",
    ).schema_registry
    assert found is not None
    assert (found.url, found.user) == ("HTTPS://registry/apis/ccompat/v7", "reader")
    assert "canary-4e" not in repr(found)


@pytest.mark.parametrize(
    ("url", "user", "password", "part"),
    [
        ("registry:8081", "", "", "SCHEMA_REGISTRY_URL: not the address of a server"),
        ("https://registry?a=b", "", "", "without a query"),
        ("https://reader:canary-4e@registry", "", "", "settings of their own"),
        ("https://registry", "reader", "", "SCHEMA_REGISTRY_PASSWORD is not set"),
        ("https://registry", "", "canary-4e", "SCHEMA_REGISTRY_USER is not set"),
        ("", "reader", "canary-4e", "SCHEMA_REGISTRY_URL is not set"),
    ],
)
def test_a_schema_registry_that_cannot_be_used_is_refused(url: str, user: str, password: str, part: str) -> None:
    told = refused(SCHEMA_REGISTRY_URL=url, SCHEMA_REGISTRY_USER=user, SCHEMA_REGISTRY_PASSWORD=password)
    assert part in told
    assert "canary" not in told


# ---------------------------------------------------------------- Kafka's security


def test_sasl_needs_its_three_settings() -> None:
    told = problems(BOOTSTRAP | {"HEADGATE_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"})
    assert [problem.split()[0] for problem in told] == [
        "HEADGATE_KAFKA_SASL_MECHANISM",
        "HEADGATE_KAFKA_SASL_USERNAME",
        "HEADGATE_KAFKA_SASL_PASSWORD",
    ]


def test_a_setting_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    assert "does not use it" in refused(KAFKA_SASL_USERNAME="headgate")
    file = tmp_path / "ca.pem"
    file.touch()
    assert "does not use it" in refused(KAFKA_CA_FILE=str(file))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    client = authority.issue_cert("client.example")
    other = authority.issue_cert("other.example")
    paths = {name: str(folder / name) for name in ("ca", "cert", "key", "other_key", "garbage")}
    authority.cert_pem.write_to_path(paths["ca"])
    client.cert_chain_pems[0].write_to_path(paths["cert"])
    client.private_key_pem.write_to_path(paths["key"])
    other.private_key_pem.write_to_path(paths["other_key"])
    Path(paths["garbage"]).write_text("not a certificate")
    return paths


def test_a_client_certificate_reaches_both_clients(pki: Mapping[str, str]) -> None:
    kafka = load(
        KAFKA_SECURITY_PROTOCOL="ssl", KAFKA_CA_FILE=pki["ca"], KAFKA_CERT_FILE=pki["cert"], KAFKA_KEY_FILE=pki["key"]
    ).kafka
    assert kafka.confluent() == {
        "bootstrap.servers": "localhost:9092",
        "security.protocol": "SSL",
        "ssl.ca.location": pki["ca"],
        "ssl.certificate.location": pki["cert"],
        "ssl.key.location": pki["key"],
        "ssl.endpoint.identification.algorithm": "https",
    }
    context = kafka.aiokafka()["ssl_context"]
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert len(context.get_ca_certs()) == 1


def test_a_password_reaches_both_clients() -> None:
    kafka = load(
        KAFKA_SECURITY_PROTOCOL="SASL_PLAINTEXT",
        KAFKA_SASL_MECHANISM="scram-sha-256",
        KAFKA_SASL_USERNAME="headgate",
        KAFKA_SASL_PASSWORD="pw",
    ).kafka
    assert kafka.confluent() == {
        "bootstrap.servers": "localhost:9092",
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "SCRAM-SHA-256",
        "sasl.username": "headgate",
        "sasl.password": "pw",
    }
    assert kafka.aiokafka() == {
        "bootstrap_servers": ["localhost:9092"],
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_plain_username": "headgate",
        "sasl_plain_password": "pw",
    }
    assert KafkaSettings("a:1,b:2").aiokafka() == {
        "bootstrap_servers": ["a:1", "b:2"],
        "security_protocol": "PLAINTEXT",
    }


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"KAFKA_CA_FILE": "garbage"}, "KAFKA_CA_FILE"),
        ({"KAFKA_CA_FILE": "ca", "KAFKA_CERT_FILE": "cert"}, "KAFKA_KEY_FILE is not set"),
        ({"KAFKA_CA_FILE": "ca", "KAFKA_KEY_FILE": "key"}, "KAFKA_CERT_FILE is not set"),
        ({"KAFKA_CA_FILE": "ca", "KAFKA_CERT_FILE": "cert", "KAFKA_KEY_FILE": "other_key"}, "KAFKA_CERT_FILE"),
        ({"KAFKA_CA_FILE": "ca", "KAFKA_CERT_FILE": "garbage", "KAFKA_KEY_FILE": "key"}, "KAFKA_CERT_FILE"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(
    pki: Mapping[str, str], files: dict[str, str], part: str
) -> None:
    problem = refused(KAFKA_SECURITY_PROTOCOL="SSL", **{name: pki[file] for name, file in files.items()})
    assert part in problem


# ---------------------------------------------------------------- production

SAFE = {
    "ENV": "production",
    "KAFKA_SECURITY_PROTOCOL": "SSL",
    "REDIS_URL": "rediss://redis:6379/0",
}


def test_production_starts_on_links_that_are_safe() -> None:
    settings = load(**SAFE)
    assert settings.env == "production"
    assert settings.keys.production
    assert (settings.log.format, settings.replication_factor) == ("json", 3)
    assert load(**SAFE | {"REDIS_URL": "unix:///run/redis.sock"}).env == "production"


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": ""}, "HEADGATE_KAFKA_SECURITY_PROTOCOL=PLAINTEXT: a plaintext link"),
        ({"REDIS_URL": ""}, "HEADGATE_REDIS_URL=redis://127.0.0.1:6379/0: a plaintext link"),
        ({"REDIS_URL": "redis://redis:6379/0"}, "HEADGATE_REDIS_URL=redis://redis:6379/0: a plaintext link"),
        (
            {"SCHEMA_REGISTRY_URL": "http://registry:8081"},
            "'http://registry:8081': a plaintext link",
        ),
        (
            {"BIGQUERY_ENDPOINT": "http://bq:80,bq:81"},
            "HEADGATE_BIGQUERY_ENDPOINT='http://bq:80,bq:81': a plaintext link",
        ),
        ({"REDIS_URL": "rediss://redis:6379/0?ssl_cert_reqs=none"}, "unverified"),
        ({"REDIS_URL": "rediss://redis:6379/0?ssl_cert_reqs=optional"}, "unverified"),
        ({"REDIS_URL": "rediss://redis:6379/0?ssl_check_hostname=false"}, "unverified"),
        ({"EGRESS_ALLOW": "10.0.0.0/8"}, "HEADGATE_EGRESS_ALLOW_IN_PRODUCTION=1"),
        ({"EGRESS_ALLOW": "10.0.0.0/8", "EGRESS_ALLOW_IN_PRODUCTION": "0"}, "HEADGATE_EGRESS_ALLOW_IN_PRODUCTION=1"),
    ],
)
def test_production_refuses_what_is_not(values: dict[str, str], part: str) -> None:
    assert part in refused(**SAFE | values)
    load(**SAFE | values | {"ENV": "development"})  # the control: only production does


def test_a_confirmed_egress_allow_starts_in_production() -> None:
    assert load(**SAFE, EGRESS_ALLOW="10.0.0.0/8", EGRESS_ALLOW_IN_PRODUCTION="1").egress_allow


# ---------------------------------------------------------------- durations and sizes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("15s", 15),
        ("5m", 300),
        ("2h", 7200),
        ("7d", 604_800),
        ("0s", 0),
        ("1h30m", 5400),
        ("1.5s", 1.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "5", "s", "5 s", "-5s", "5S", "5w", "1e3s", "٣s", "nan", "inf s", "1..5s", "9" * 400 + "d"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("64KiB", 65_536),
        ("256MiB", 2**28),
        ("1 GiB", 2**30),
        ("1MB", 10**6),
        ("1.5KiB", 1536),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1mib", "1M", "0.3B", "1e6", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        parse_bytes(text)


@given(st.integers(0, 10**9))
def test_shown_durations_and_sizes_read_the_same(number: int) -> None:
    assert parse_duration_s(show_duration(number / 1000)) == number / 1000
    assert parse_bytes(show_bytes(number)) == number


@given(st.text())
def test_any_text_is_a_duration_and_a_size_or_a_value_error(text: str) -> None:
    for parse in (parse_duration_s, parse_bytes):
        try:
            assert parse(text) >= 0
        except ValueError as fault:
            assert str(fault)


# ---------------------------------------------------------------- the page


def test_the_page_is_current_and_names_every_setting() -> None:
    page = settings_page()
    assert (ROOT / "docs/settings.md").read_text() == page, "docs/settings.md is out of date: make docs"
    assert all(f"`{name}`" in page for name in SETTINGS)


def test_every_default_and_example_is_one_that_would_be_accepted() -> None:
    for name, setting in SETTINGS.items():
        for text in (setting.default, setting.production_default, setting.example):
            if text and not name.endswith("_FILE"):
                setting.parse(text)


def test_every_name_of_the_design_is_known() -> None:
    names = """KAFKA_BOOTSTRAP KAFKA_SECURITY_PROTOCOL KAFKA_SASL_MECHANISM KAFKA_SASL_USERNAME KAFKA_SASL_PASSWORD
        KAFKA_CA_FILE KAFKA_CERT_FILE KAFKA_KEY_FILE SCHEMA_REGISTRY_URL SCHEMA_REGISTRY_USER SCHEMA_REGISTRY_PASSWORD
        REDIS_URL POSTGRES_DSN MASTER_KEY MASTER_KEY_FILE PREFIX VENDORS INGRESS_PARTITIONS DEFAULT_TOPICS POOLS
        RETRY_TIERS MAX_EVENT_BYTES REPLICATION_FACTOR INGRESS_RETENTION ATTEMPTS_RETENTION DLQ_RETENTION DEDUPE_TTL
        LEDGER_TTL BIGQUERY_ENDPOINT COMMIT_INTERVAL IN_FLIGHT MEMORY_BUDGET SHUTDOWN_TIMEOUT EGRESS_ALLOW
        WORKER_ID HTTP_PORT TENANT_LABEL TYPE_LABEL LOG_FORMAT LOG_LEVEL DEV_DIR ENV EGRESS_ALLOW_IN_PRODUCTION
        BIGQUERY_DEFAULT_CREDENTIALS"""
    assert {f"HEADGATE_{name}" for name in names.split()} == {*SETTINGS, *(f"HEADGATE_{name}" for name in LATER)}
