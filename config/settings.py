"""Every setting of Headgate (design, section 10): read once from `HEADGATE_…` variables into small frozen groups.

Owns names, defaults, bounds and what production refuses. All faults are collected before any is told. The page
`docs/settings.md` is written from the same declarations: `python -m config.settings > docs/settings.md`.
"""

import difflib
import ipaddress
import math
import re
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import SplitResult, parse_qs, urlsplit

import msgspec
from msgspec import Struct
from pydantic import SecretStr

from schemas.control import DEFAULT_MAX_AGE_S
from schemas.ids import DEFAULT_VENDOR, NAME, Vendor, name_problem
from schemas.topics import Sizes, Topics

T = TypeVar("T")
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
SecurityProtocol: TypeAlias = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism: TypeAlias = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
TopicsChoice: TypeAlias = Literal["own", "pooled"]
TenantLabel: TypeAlias = Literal["tag", "tenant", "none"]
LogFormat: TypeAlias = Literal["console", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
Environment: TypeAlias = Literal["development", "production"]

PREFIX: Final = "HEADGATE_"
MAX_SHUTDOWN_S: Final = 30.0
MAX_FIRST_TIER_S: Final = 1.0
_DAY_S: Final = 86_400.0
_HUNDRED_YEARS_S: Final = 36_525 * _DAY_S
_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_MAX_SHOWN: Final = 80


class SettingsError(Exception):
    """Settings that cannot be used. Each problem names the variable, the value seen (no secret's) and the remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


# ---------------------------------------------------------------- spelling


_DURATION: Final = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|s|m|h|d))+")
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_UNIT_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(B|KB|MB|GB|KiB|MiB|GiB)?")
_UNIT_BYTES: Final = {
    None: 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": _KIB, "MiB": _MIB, "GiB": 1024 * _MIB
}  # fmt: skip


def parse_duration_s(text: str) -> float:
    """Seconds of `250ms`, `15s`, `5m`, `2h`, `7d` or `1h30m`. Raises ValueError: why not, and the remedy; no value."""
    text = text.strip()
    if not _DURATION.fullmatch(text):
        raise ValueError("not a duration; write a number and a unit (ms, s, m, h, d), such as 250ms, 15s, 5m, 2h or 7d")
    total_s = math.fsum(float(number) * _UNIT_MS[unit] for number, unit in _DURATION_PART.findall(text)) / 1000
    if total_s > _HUNDRED_YEARS_S:
        raise ValueError("longer than a hundred years; write a shorter duration")
    return total_s


def parse_bytes(text: str) -> int:
    """Bytes of `1048576`, `64KiB`, `256MiB`, `1GB`. Raises ValueError: why not, and the remedy; no value."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError("not a size; write a number and a unit (B, KiB, MiB, GiB), such as 256MiB")
    size = float(found[1]) * _UNIT_BYTES[found[2]]
    if size > 2**50:
        raise ValueError("larger than 1024 TiB; write a smaller size")
    if size != int(size):
        raise ValueError("not a whole number of bytes")
    return int(size)


def show_duration(seconds: float) -> str:
    """In the largest unit that makes it a whole number; to the millisecond."""
    millis = round(seconds * 1000)
    for unit in ("d", "h", "m", "s"):
        size = _UNIT_MS[unit]
        if millis >= size and millis % size == 0:
            return f"{millis // size}{unit}"
    return f"{millis}ms"


def show_bytes(size: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNIT_BYTES[unit] and size % _UNIT_BYTES[unit] == 0:
            return f"{size // _UNIT_BYTES[unit]}{unit}"
    return str(size)


def _text(text: str) -> str:
    return text


def _secret(text: str) -> SecretStr:
    return SecretStr(text)


def _one_of(*choices: str, fold: Callable[[str], str] = str.lower) -> Callable[[str], Any]:
    def parse(text: str) -> str:
        if fold(text) not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return fold(text)

    return parse


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise ValueError(f"not a whole number from {least} to {most}")
        return int(text)

    return parse


def _duration(least_s: float, most_s: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        duration_s = parse_duration_s(text)
        if not least_s <= duration_s <= most_s:
            raise ValueError(f"must be from {show_duration(least_s)} to {show_duration(most_s)}")
        return duration_s

    return parse


def _size(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        size = parse_bytes(text)
        if not least <= size <= most:
            raise ValueError(f"must be from {show_bytes(least)} to {show_bytes(most)}")
        return size

    return parse


def _switch(text: str) -> bool:
    known = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise ValueError("neither on nor off")
    return known[text.lower()]


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")


def _bootstrap(text: str) -> str:
    for server in _list(text):
        host, colon, port = server.rpartition(":")
        if not colon or not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{server[:_MAX_SHOWN]!r} is not host:port; write brokers as host:port,host:port")
    if not _list(text):
        raise ValueError("names no broker; write brokers as host:port,host:port")
    return ",".join(_list(text))


def _file(text: str) -> Path:
    path = Path(text).expanduser()
    try:
        with path.open("rb"):
            return path
    except OSError as fault:
        raise ValueError(f"cannot be read ({fault.strerror}); give a file that this user can read") from None


def _prefix(text: str) -> str:
    if not NAME.fullmatch(text):  # a dot would let the topics of two prefixes meet
        raise ValueError("must match [a-z0-9][a-z0-9-]{0,47}: lower-case letters, digits and hyphens, at most 48")
    return text


def _vendors(text: str) -> tuple[Vendor, ...]:
    names = _list(text)
    if not names:
        raise ValueError("names no vendor; write names separated by commas")
    for name in names:
        if (problem := name_problem(name)) is not None:
            raise ValueError(f"{name[:_MAX_SHOWN]!r} {problem}")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands there twice")
    return tuple(Vendor(name) for name in names)


def _tiers(text: str) -> tuple[float, ...]:
    try:
        tiers_s = tuple(parse_duration_s(part) for part in _list(text))
    except ValueError as fault:
        raise ValueError(f"one of them is {fault}") from None
    if not tiers_s or len(tiers_s) > 32:
        raise ValueError("must name 1 to 32 durations, separated by commas")
    if any(after <= before for before, after in pairwise(tiers_s)):
        raise ValueError("must be ascending, each longer than the one before")
    if not 0 < tiers_s[0] <= MAX_FIRST_TIER_S:
        raise ValueError("must start with at most 1s, so that a retry is met within a second")
    if tiers_s[-1] > 30 * _DAY_S:
        raise ValueError("must not be longer than 30d")
    return tiers_s


def _networks(text: str) -> tuple[Network, ...]:
    networks = []
    for part in _list(text):
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError as fault:
            raise ValueError(f"{fault}; write CIDRs such as 10.0.0.0/8, separated by commas") from None
    return tuple(networks)


def _worker_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", text):
        raise ValueError("must be 1 to 200 letters, digits, dots, hyphens or underscores, such as a pod's name")
    return text


def _url(text: str) -> tuple[SplitResult, int | None]:
    """The parts of a URL and its port; port 0, which none has, if it is no URL."""
    try:
        url = urlsplit(text)
        return url, url.port
    except ValueError:
        return SplitResult("", "", "", "", ""), 0


def _redis_url(text: str) -> str:
    url, port = _url(text)
    if url.scheme not in ("redis", "rediss", "unix") or port == 0 or (url.scheme != "unix" and not url.hostname):
        raise ValueError("not a Redis URL; write redis://host:6379/0, rediss://host:6379/0 or unix:///path")
    if url.scheme != "unix" and not re.fullmatch(r"/?[0-9]{0,4}", url.path):
        raise ValueError("its path must be the number of a database, such as /0")
    return text


def _http_url(text: str) -> str:
    url, port = _url(text)
    if url.scheme not in ("http", "https") or port == 0 or not url.hostname or url.query or url.fragment:
        raise ValueError("not the address of a server; write https://registry:8081, without a query")
    if "@" in url.netloc:
        raise ValueError("holds a user or a password; they have settings of their own")
    return text.rstrip("/")


class BigQueryPlace(NamedTuple):
    """Where BigQuery answers: the base of its REST API, and `host:port` of the Storage Write API, in TLS if that is."""

    rest_url: str = "https://bigquery.googleapis.com"
    write_address: str = "bigquerystorage.googleapis.com:443"

    @property
    def encrypted(self) -> bool:
        return self.rest_url.startswith("https:")


def _bigquery_place(text: str) -> BigQueryPlace:
    try:
        rest_url, write_address = _list(text)
        place = BigQueryPlace(_http_url(rest_url), _bootstrap(write_address))
    except ValueError:
        raise ValueError(
            "not the addresses of REST and of the Storage Write API; write https://bigquery.acme.example,"
            "bigquery.acme.example:443, where https says that both are spoken to in TLS"
        ) from None
    return place


# ---------------------------------------------------------------- declarations


class Setting(Struct, Generic[T], frozen=True):
    """One variable. `default` and `example` are spelled as a user would; "" as default: none."""

    name: str
    parse: Callable[[str], T]
    default: str
    example: str
    meaning: str
    secret: bool = False
    production_default: str = ""


_GROUPS: Final[dict[str, list[Setting[Any]]]] = {}


class _Group:
    """Declares settings under one heading of the page."""

    def __init__(self, title: str) -> None:
        self._members = _GROUPS.setdefault(title, [])

    def __call__(self, setting: Setting[T]) -> Setting[T]:
        self._members.append(setting)
        return setting


_in = _Group("Kafka")
KAFKA_BOOTSTRAP: Final = _in(
    Setting("KAFKA_BOOTSTRAP", _bootstrap, "", "kafka-1:9092,kafka-2:9092", "Brokers to start from. Required.")
)
KAFKA_SECURITY_PROTOCOL: Final = _in(
    Setting[SecurityProtocol](
        "KAFKA_SECURITY_PROTOCOL",
        _one_of("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL", fold=str.upper),
        "PLAINTEXT",
        "SASL_SSL",
        "How to speak to the brokers: `PLAINTEXT`, `SSL`, `SASL_PLAINTEXT` or `SASL_SSL`.",
    )
)
KAFKA_SASL_MECHANISM: Final = _in(
    Setting[SaslMechanism](
        "KAFKA_SASL_MECHANISM",
        _one_of("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", fold=str.upper),
        "",
        "SCRAM-SHA-512",
        "`PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`. Required with SASL.",
    )
)
KAFKA_SASL_USERNAME: Final = _in(Setting("KAFKA_SASL_USERNAME", _text, "", "headgate", "Required with SASL."))
KAFKA_SASL_PASSWORD: Final = _in(Setting("KAFKA_SASL_PASSWORD", _secret, "", "", "Required with SASL.", secret=True))
KAFKA_CA_FILE: Final = _in(
    Setting(
        "KAFKA_CA_FILE",
        _file,
        "",
        "/etc/headgate/ca.pem",
        "Authorities of the brokers' certificates (PEM). Without: the system's.",
    )
)
KAFKA_CERT_FILE: Final = _in(
    Setting(
        "KAFKA_CERT_FILE",
        _file,
        "",
        "/etc/headgate/client.pem",
        "This client's certificate (PEM), where brokers ask for one.",
    )
)
KAFKA_KEY_FILE: Final = _in(
    Setting("KAFKA_KEY_FILE", _file, "", "/etc/headgate/client.key", "Its private key (PEM, without a passphrase).")
)

_in = _Group("Schema registry")
SCHEMA_REGISTRY_URL: Final = _in(
    Setting(
        "SCHEMA_REGISTRY_URL",
        _http_url,
        "",
        "https://registry:8081",
        "Where the schemas of Avro events are, by Confluent's API. Without it events are JSON only.",
        secret=True,
    )
)
SCHEMA_REGISTRY_USER: Final = _in(
    Setting(
        "SCHEMA_REGISTRY_USER", _text, "", "headgate", "For a registry that asks for a user (basic authentication)."
    )
)
SCHEMA_REGISTRY_PASSWORD: Final = _in(
    Setting(
        "SCHEMA_REGISTRY_PASSWORD", _secret, "", "", "The user's password, or the secret of an API key.", secret=True
    )
)

_in = _Group("Redis")
REDIS_URL: Final = _in(
    Setting(
        "REDIS_URL",
        _redis_url,
        "redis://127.0.0.1:6379/0",
        "rediss://redis:6379/0",
        "Where duplicates are remembered. It may be away: then duplicates can pass, nothing else happens.",
        secret=True,
    )
)
DEDUPE_TTL: Final = _in(
    Setting("DEDUPE_TTL", _duration(60, 90 * _DAY_S), "24h", "48h", "How long an event published twice is recognised.")
)
LEDGER_TTL: Final = _in(
    Setting(
        "LEDGER_TTL", _duration(60, 90 * _DAY_S), "7d", "14d", "How long it is remembered how far a delivery has come."
    )
)

_in = _Group("Keys")
MASTER_KEY: Final = _in(
    Setting(
        "MASTER_KEY",
        _secret,
        "",
        "k1:<base64 of 32 bytes>",
        "Master key as `id:base64` of 32 bytes, or several lines of them: the first wraps, all open.",
        secret=True,
    )
)
MASTER_KEY_FILE: Final = _in(
    Setting(
        "MASTER_KEY_FILE",
        _file,
        "",
        "/etc/headgate/master.key",
        "A file with such lines. Give this or `HEADGATE_MASTER_KEY`.",
    )
)

_in = _Group("Topics and tenants")
TOPIC_PREFIX: Final = _in(
    Setting("PREFIX", _prefix, "headgate", "headgate-eu", "How names of topics and groups start.")
)
VENDORS: Final = _in(
    Setting("VENDORS", _vendors, str(DEFAULT_VENDOR), "north,south", "The vendors that share this deployment.")
)
INGRESS_PARTITIONS: Final = _in(
    Setting(
        "INGRESS_PARTITIONS",
        _whole(1, 10_000),
        "12",
        "48",
        "Partitions of a vendor's ingress topic when it is made: at most that many workers share its load.",
    )
)
DEFAULT_TOPICS: Final = _in(
    Setting[TopicsChoice](
        "DEFAULT_TOPICS",
        _one_of("own", "pooled"),
        "own",
        "pooled",
        "Whether a new tenant gets topics of its `own` or shares those of a pool (`pooled`: for thousands of tenants).",
    )
)
POOLS: Final = _in(
    Setting("POOLS", _whole(1, 1000), "16", "32", "Number of pools. A tenant stays in the pool that it got.")
)
RETRY_TIERS: Final = _in(
    Setting(
        "RETRY_TIERS",
        _tiers,
        "1s,5s,30s,5m,30m,2h,10h",
        "1s,10s,2m,1h",
        "Waits of the partitions of a retry topic, ascending, the first at most 1s. Schedules need not match them.",
    )
)
MAX_EVENT_BYTES: Final = _in(
    Setting("MAX_EVENT_BYTES", _size(_KIB, 32 * _MIB), "1MiB", "4MiB", "The largest event; topics take more than that.")
)
REPLICATION_FACTOR: Final = _in(
    Setting(
        "REPLICATION_FACTOR", _whole(1, 9), "1", "3", "Copies of each partition that we make.", production_default="3"
    )
)
INGRESS_RETENTION: Final = _in(
    Setting("INGRESS_RETENTION", _duration(3600, 3650 * _DAY_S), "7d", "14d", "How long ingress keeps events.")
)
ATTEMPTS_RETENTION: Final = _in(
    Setting("ATTEMPTS_RETENTION", _duration(3600, 3650 * _DAY_S), "7d", "30d", "How long attempts and audit are kept.")
)
DLQ_RETENTION: Final = _in(
    Setting("DLQ_RETENTION", _duration(3600, 3650 * _DAY_S), "30d", "90d", "How long dead letters are kept.")
)

_in = _Group("Worker")
WORKER_ID: Final = _in(
    Setting(
        "WORKER_ID",
        _worker_id,
        "",
        "headgate-0",
        "Stable name of this replica (a StatefulSet's pod name): with it a restart moves no partitions.",
    )
)
IN_FLIGHT: Final = _in(
    Setting("IN_FLIGHT", _whole(1, 100_000), "512", "2000", "Attempts that one worker has open at a time.")
)
MEMORY_BUDGET: Final = _in(
    Setting(
        "MEMORY_BUDGET",
        _size(8 * _MIB, 1024 * 1024 * _MIB),
        "256MiB",
        "1GiB",
        "Bytes of events that one worker holds; beyond, what waits is parked in Kafka.",
    )
)
COMMIT_INTERVAL: Final = _in(
    Setting("COMMIT_INTERVAL", _duration(0.05, 30), "500ms", "1s", "How often settled offsets are committed.")
)
SHUTDOWN_TIMEOUT: Final = _in(
    Setting("SHUTDOWN_TIMEOUT", _duration(1, MAX_SHUTDOWN_S), "30s", "20s", "SIGTERM ends a worker within that time.")
)
EGRESS_ALLOW: Final = _in(
    Setting(
        "EGRESS_ALLOW",
        _networks,
        "",
        "10.1.0.0/16,fd00:1::/64",
        "CIDRs of private addresses that deliveries may reach. Every tenant's deliveries: open as little as you can.",
    )
)
EGRESS_ALLOW_IN_PRODUCTION: Final = _in(
    Setting("EGRESS_ALLOW_IN_PRODUCTION", _switch, "off", "1", "Confirms `EGRESS_ALLOW` with `ENV=production`.")
)
BIGQUERY_ENDPOINT: Final = _in(
    Setting(
        "BIGQUERY_ENDPOINT",
        _bigquery_place,
        ",".join(BigQueryPlace()),
        "http://127.0.0.1:9050,127.0.0.1:9060",
        "Where BigQuery destinations go: REST, and host:port of the Storage Write API; https says TLS for both.",
    )
)
BIGQUERY_DEFAULT_CREDENTIALS: Final = _in(
    Setting(
        "BIGQUERY_DEFAULT_CREDENTIALS",
        _switch,
        "off",
        "on",
        "Lets BigQuery destinations without a key of their own use the worker's application default credentials. Every "
        "tenant's: whatever these may write to, each of them can name.",
    )
)

_in = _Group("What is seen")
HTTP_PORT: Final = _in(
    Setting("HTTP_PORT", _whole(0, 65535), "8080", "0", "Port of /metrics, /healthz and /readyz; 0 takes a free one.")
)
TENANT_LABEL: Final = _in(
    Setting[TenantLabel](
        "TENANT_LABEL",
        _one_of("tag", "tenant", "none"),
        "tag",
        "tenant",
        "The label `tenant` of metrics: the tenant's tag (`tag`), its id (`tenant`), or nothing (`none`).",
    )
)
TYPE_LABEL: Final = _in(
    Setting("TYPE_LABEL", _switch, "off", "on", "Whether delivery times are told apart by event type.")
)
LOG_FORMAT: Final = _in(
    Setting[LogFormat](
        "LOG_FORMAT",
        _one_of("console", "json"),
        "console",
        "json",
        "`console` for people, `json` for machines; on stderr.",
        production_default="json",
    )
)
LOG_LEVEL: Final = _in(
    Setting[LogLevel](
        "LOG_LEVEL", _one_of("debug", "info", "warning", "error"), "info", "debug", "The least level that is written."
    )
)

_in = _Group("Deployment")
ENV: Final = _in(
    Setting[Environment](
        "ENV",
        _one_of("development", "production"),
        "development",
        "production",
        "`production` refuses plaintext links, unverified certificates, development keys, unconfirmed `EGRESS_ALLOW`.",
    )
)
DEV_DIR: Final = _in(Setting("DEV_DIR", Path, ".headgate", "/tmp/headgate", "Data of `headgate dev`."))

LATER: Final = {
    "POSTGRES_DSN": "the API",
}
SETTINGS: Final = {PREFIX + setting.name: setting for members in _GROUPS.values() for setting in members}
_SECRET_LATER: Final = frozenset({"POSTGRES_DSN"})

# variables of our own tools, and those that Kubernetes makes up for a service called headgate
_OURS: Final = re.compile(r"HEADGATE_(?:DEV_|TEST_|BENCH_|CACHE_DIR$)")
_KUBERNETES: Final = re.compile(r"HEADGATE_(?:[A-Z0-9_]+_)?(?:SERVICE_(?:HOST|PORT)|PORT)(?:_[A-Z0-9_]+)?")


# ---------------------------------------------------------------- groups


class KafkaSettings(Struct, frozen=True):
    bootstrap: str
    security_protocol: SecurityProtocol = "PLAINTEXT"
    sasl_mechanism: SaslMechanism | None = None
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @property
    def encrypted(self) -> bool:
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def sasl(self) -> bool:
        return self.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    def confluent(self) -> dict[str, Any]:
        """How librdkafka connects. Holds the password: not for logs."""
        config: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": self.security_protocol,
        }
        if self.sasl and self.sasl_password is not None:
            config["sasl.mechanism"] = self.sasl_mechanism
            config["sasl.username"] = self.sasl_username
            config["sasl.password"] = self.sasl_password.get_secret_value()
        if self.encrypted:
            files = {
                "ssl.ca.location": self.ca_file,
                "ssl.certificate.location": self.cert_file,
                "ssl.key.location": self.key_file,
            }
            config.update({name: str(path) for name, path in files.items() if path is not None})
            config["ssl.endpoint.identification.algorithm"] = "https"
        return config

    def aiokafka(self) -> dict[str, Any]:
        """Keyword arguments of aiokafka's clients that say how to connect. Holds the password: not for logs."""
        arguments: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap.split(","),
            "security_protocol": self.security_protocol,
        }
        if self.sasl and self.sasl_password is not None:
            arguments["sasl_mechanism"] = self.sasl_mechanism
            arguments["sasl_plain_username"] = self.sasl_username
            arguments["sasl_plain_password"] = self.sasl_password.get_secret_value()
        if self.encrypted:
            arguments["ssl_context"] = self.ssl_context()
        return arguments

    def ssl_context(self) -> ssl.SSLContext:
        """Verifies the broker's certificate and name; TLS 1.2 at least. Raises OSError for files of another kind."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert_file is not None:
            # an empty passphrase, so that OpenSSL does not ask for one on the terminal
            context.load_cert_chain(self.cert_file, self.key_file, password="")
        return context


class SchemaRegistrySettings(Struct, frozen=True):
    """User and password are both given, or neither is."""

    url: str
    user: str | None = None
    password: SecretStr | None = None


class RedisSettings(Struct, frozen=True):
    """`url` may hold a password: show `shown`."""

    url: str
    dedupe_ttl_s: float = _DAY_S
    ledger_ttl_s: float = 7 * _DAY_S
    deadline_s: float = 0.05
    off_s: float = 1.0

    @property
    def shown(self) -> str:
        url = urlsplit(self.url)
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

    def __repr__(self) -> str:
        return f"RedisSettings({self.shown!r}, dedupe_ttl_s={self.dedupe_ttl_s}, ledger_ttl_s={self.ledger_ttl_s})"


class KeySettings(Struct, frozen=True):
    """Where the master keys are. `production` refuses development keys."""

    master_key: SecretStr | None = None
    master_key_file: Path | None = None
    production: bool = False


class TenantSettings(Struct, frozen=True):
    """What a new tenant gets where its configuration leaves it open."""

    default_topics: TopicsChoice = "own"
    pools: int = 16


class WorkerSettings(Struct, frozen=True):
    """`id` is None for a worker that is not a static member; `http_port` 0 takes a free port."""

    id: str | None = None
    in_flight: int = 512
    memory_budget_bytes: int = 256 * _MIB
    commit_interval_s: float = 0.5
    shutdown_timeout_s: float = MAX_SHUTDOWN_S
    http_port: int = 8080
    tenant_label: TenantLabel = "tag"
    type_label: bool = False


class BigQuerySettings(Struct, frozen=True):
    """What the operator says of BigQuery: where it is, and whether tenants may use the worker's own credentials."""

    place: BigQueryPlace = BigQueryPlace()
    default_credentials: bool = False


class LogSettings(Struct, frozen=True):
    format: LogFormat = "console"
    level: LogLevel = "info"


class Settings(Struct, frozen=True):
    """All groups. Pass the group on that is needed, not this.

    `warnings` are for whoever started the process: variables that look like ours and are not.
    """

    kafka: KafkaSettings
    topics: Topics
    vendors: tuple[Vendor, ...]
    sizes: Sizes
    schema_registry: SchemaRegistrySettings | None
    redis: RedisSettings
    keys: KeySettings
    tenants: TenantSettings
    worker: WorkerSettings
    egress_allow: tuple[Network, ...]
    bigquery: BigQuerySettings
    replication_factor: int
    log: LogSettings
    dev_dir: Path
    env: Environment
    warnings: tuple[str, ...] = ()

    @staticmethod
    def load(env: Mapping[str, str]) -> "Settings":
        """Reads every setting of the mapping; an empty value counts as none. Raises `SettingsError` with all faults."""
        read = _Reader(env)
        production = read(ENV) == "production"
        read.production = production
        kafka = KafkaSettings(
            bootstrap=read.required(KAFKA_BOOTSTRAP, "the brokers' addresses, such as localhost:9092"),
            security_protocol=read(KAFKA_SECURITY_PROTOCOL),
            sasl_mechanism=read.optional(KAFKA_SASL_MECHANISM),
            sasl_username=read.optional(KAFKA_SASL_USERNAME),
            sasl_password=read.optional(KAFKA_SASL_PASSWORD),
            ca_file=read.optional(KAFKA_CA_FILE),
            cert_file=read.optional(KAFKA_CERT_FILE),
            key_file=read.optional(KAFKA_KEY_FILE),
        )
        redis = RedisSettings(read(REDIS_URL), read(DEDUPE_TTL), read(LEDGER_TTL))
        settings = Settings(
            kafka=kafka,
            topics=Topics(read(TOPIC_PREFIX)),
            vendors=read(VENDORS),
            sizes=Sizes(
                max_event_bytes=read(MAX_EVENT_BYTES),
                ingress_partitions=read(INGRESS_PARTITIONS),
                retry_tiers_s=read(RETRY_TIERS),
                ingress_retention_ms=_ms(read(INGRESS_RETENTION)),
                attempts_retention_ms=_ms(read(ATTEMPTS_RETENTION)),
                dlq_retention_ms=_ms(read(DLQ_RETENTION)),
                longest_max_age_ms=_ms(DEFAULT_MAX_AGE_S),
            ),
            schema_registry=_schema_registry(read),
            redis=redis,
            keys=KeySettings(read.optional(MASTER_KEY), read.optional(MASTER_KEY_FILE), production),
            tenants=TenantSettings(read(DEFAULT_TOPICS), read(POOLS)),
            worker=WorkerSettings(
                id=read.optional(WORKER_ID),
                in_flight=read(IN_FLIGHT),
                memory_budget_bytes=read(MEMORY_BUDGET),
                commit_interval_s=read(COMMIT_INTERVAL),
                shutdown_timeout_s=read(SHUTDOWN_TIMEOUT),
                http_port=read(HTTP_PORT),
                tenant_label=read(TENANT_LABEL),
                type_label=read(TYPE_LABEL),
            ),
            egress_allow=read.optional(EGRESS_ALLOW) or (),
            bigquery=BigQuerySettings(read(BIGQUERY_ENDPOINT), read(BIGQUERY_DEFAULT_CREDENTIALS)),
            replication_factor=read(REPLICATION_FACTOR),
            log=LogSettings(read(LOG_FORMAT), read(LOG_LEVEL)),
            dev_dir=read(DEV_DIR),
            env="production" if production else "development",
            warnings=tuple(_strangers(env)),
        )
        problems = [*read.problems, *_later(env), *_kafka_problems(settings.kafka, read), *_key_problems(settings.keys)]
        if production:
            problems += _production_problems(settings, confirmed=read(EGRESS_ALLOW_IN_PRODUCTION))
        if problems:
            raise SettingsError(problems)
        return settings


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


class _Reader:
    """Reads declared settings out of a mapping and gathers what is wrong with them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.problems: list[str] = []
        self.faulty: set[str] = set()
        self.production = False

    def __call__(self, setting: Setting[T]) -> T:
        """The value, or the default. After a fault the default too, so that reading goes on."""
        default = (self.production and setting.production_default) or setting.default
        value = self.optional(setting)
        return setting.parse(default) if value is None else value

    def optional(self, setting: Setting[T]) -> T | None:
        text = self._env.get(PREFIX + setting.name, "").strip()
        if not text:
            return None
        try:
            return setting.parse(text)
        except ValueError as fault:
            seen = "" if setting.secret else f"={_shown(text)}"
            self.problems.append(f"{PREFIX}{setting.name}{seen}: {fault}")
            self.faulty.add(setting.name)
            return None

    def required(self, setting: Setting[T], what: str) -> T:
        value = self.optional(setting)
        if value is not None:
            return value
        if setting.name not in self.faulty:
            self.problems.append(f"{PREFIX}{setting.name} is not set; give {what}")
        return setting.parse(setting.example)


def _schema_registry(read: _Reader) -> SchemaRegistrySettings | None:
    url, user = read.optional(SCHEMA_REGISTRY_URL), read.optional(SCHEMA_REGISTRY_USER)
    password = read.optional(SCHEMA_REGISTRY_PASSWORD)
    if (user is None) != (password is None):
        missing = "SCHEMA_REGISTRY_PASSWORD" if password is None else "SCHEMA_REGISTRY_USER"
        read.problems.append(f"{PREFIX}{missing} is not set; a user and a password go together")
    elif user is not None and url is None and SCHEMA_REGISTRY_URL.name not in read.faulty:
        read.problems.append(f"{PREFIX}SCHEMA_REGISTRY_URL is not set; a user and a password are of no use without it")
    return None if url is None else SchemaRegistrySettings(url, user, password)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…")


def _later(env: Mapping[str, str]) -> Iterator[str]:
    for name, what in LATER.items():
        if text := env.get(PREFIX + name):
            seen = "" if name in _SECRET_LATER else f"={_shown(text)}"
            yield f"{PREFIX}{name}{seen}: arrives with a later release, as {what} does; leave it out"


def _strangers(env: Mapping[str, str]) -> Iterator[str]:
    known = {*SETTINGS, *(PREFIX + name for name in LATER)}
    for name in sorted(env):
        if not name.startswith(PREFIX) or name in known or _OURS.match(name):
            continue
        if _KUBERNETES.fullmatch(name) and ("SERVICE" in name or "://" in env[name]):
            continue
        close = difflib.get_close_matches(name, known, 1)
        yield f"{name} is not a setting and does nothing" + (f"; did you mean {close[0]}?" if close else "")


def _kafka_problems(kafka: KafkaSettings, read: _Reader) -> Iterator[str]:
    """What the settings of Kafka ask for together."""
    if read.faulty & {name.removeprefix(PREFIX) for name in SETTINGS if "_KAFKA_" in name}:
        return
    named = {
        "KAFKA_SASL_MECHANISM": kafka.sasl_mechanism,
        "KAFKA_SASL_USERNAME": kafka.sasl_username,
        "KAFKA_SASL_PASSWORD": kafka.sasl_password,
    }
    protocol = f"{PREFIX}KAFKA_SECURITY_PROTOCOL={kafka.security_protocol}"
    for name, value in named.items():
        if kafka.sasl and value is None:
            yield f"{PREFIX}{name} is not set, but {protocol} needs it"
        if not kafka.sasl and value is not None:
            yield f"{PREFIX}{name} is set, but {protocol} does not use it; write SASL_SSL there or leave this out"
    files = {"KAFKA_CA_FILE": kafka.ca_file, "KAFKA_CERT_FILE": kafka.cert_file, "KAFKA_KEY_FILE": kafka.key_file}
    for name, path in files.items():
        if not kafka.encrypted and path is not None:
            yield f"{PREFIX}{name} is set, but {protocol} does not use it; write SSL or SASL_SSL there, or drop this"
    if (kafka.cert_file is None) != (kafka.key_file is None):
        missing = "KAFKA_KEY_FILE" if kafka.key_file is None else "KAFKA_CERT_FILE"
        yield f"{PREFIX}{missing} is not set; a certificate and its key go together"
    elif kafka.encrypted:
        try:
            msgspec.structs.replace(kafka, cert_file=None).ssl_context()
        except OSError:
            yield f"{PREFIX}KAFKA_CA_FILE={_shown(str(kafka.ca_file))}: holds no certificate in PEM form"
            return
        try:
            kafka.ssl_context()
        except OSError:
            yield (
                f"{PREFIX}KAFKA_CERT_FILE={_shown(str(kafka.cert_file))}: no certificate in PEM form with the key of "
                f"{PREFIX}KAFKA_KEY_FILE={_shown(str(kafka.key_file))} (without a passphrase)"
            )


def _key_problems(keys: KeySettings) -> Iterator[str]:
    if keys.master_key is not None and keys.master_key_file is not None:
        yield f"{PREFIX}MASTER_KEY and {PREFIX}MASTER_KEY_FILE are both set; keep one"


def _production_problems(settings: Settings, confirmed: bool) -> Iterator[str]:
    why = f"{PREFIX}ENV=production"
    kafka, redis = settings.kafka, settings.redis
    if not kafka.encrypted:
        yield (
            f"{PREFIX}KAFKA_SECURITY_PROTOCOL={kafka.security_protocol}: a plaintext link, which {why} refuses; "
            "write SSL or SASL_SSL"
        )
    url = urlsplit(redis.url)
    if url.scheme == "redis":
        yield f"{PREFIX}REDIS_URL={redis.shown}: a plaintext link, which {why} refuses; write rediss://…"
    options = parse_qs(url.query)
    checks = options.get("ssl_cert_reqs", ["required"]) + options.get("ssl_check_hostname", ["true"])
    if any(check.lower() not in ("required", "true", "1", "yes", "on") for check in checks):
        yield (f"{PREFIX}REDIS_URL: its ssl_… options leave certificates unverified, which {why} refuses; drop them")
    schemas = settings.schema_registry
    if schemas is not None and urlsplit(schemas.url).scheme != "https":
        seen = _shown(schemas.url)
        yield f"{PREFIX}SCHEMA_REGISTRY_URL={seen}: a plaintext link, which {why} refuses; write https://…"
    if not settings.bigquery.place.encrypted:
        seen = _shown(",".join(settings.bigquery.place))
        yield f"{PREFIX}BIGQUERY_ENDPOINT={seen}: a plaintext link, which {why} refuses; write https://…"
    if settings.egress_allow and not confirmed:
        networks = ",".join(str(network) for network in settings.egress_allow)
        yield (
            f"{PREFIX}EGRESS_ALLOW={networks}: opens these addresses to every tenant; where that is meant, confirm it "
            f"with {PREFIX}EGRESS_ALLOW_IN_PRODUCTION=1 ({why})"
        )


# ---------------------------------------------------------------- the page


def settings_page() -> str:
    """`docs/settings.md`."""
    lines = [
        "<!-- Generated by `make docs`. Do not edit. -->",
        "",
        "# Settings",
        "",
        "Read once at start from `HEADGATE_…` environment variables; an empty value counts as none. Durations are",
        "written `250ms`, `15s`, `5m`, `2h`, `7d`, sizes `64KiB`, `256MiB`. Wrong values are refused at start, by name",
        "and all at once; a variable that looks like ours and is not gives a warning. `headgate dev up` prints those",
        "that a development stack needs.",
    ]
    for title, members in _GROUPS.items():
        lines += ["", f"## {title}", "", "| name | meaning | default | example |", "|---|---|---|---|"]
        lines += [
            f"| `{PREFIX}{s.name}` | {s.meaning} | {_default(s)} | {f'`{s.example}`' if s.example else ''} |"
            for s in members
        ]
    lines += ["", "## With a later release", "", "Known names; setting one is refused until then.", ""]
    lines += [f"- `{PREFIX}{name}`: {what}" for name, what in LATER.items()]
    return "\n".join(lines) + "\n"


def _default(setting: Setting[Any]) -> str:
    if setting.production_default:
        return f"`{setting.default}`; in production `{setting.production_default}`"
    return f"`{setting.default}`" if setting.default else ""


if __name__ == "__main__":
    sys.stdout.write(settings_page())
