"""What a Kafka destination is told: the only declaration, from which validation, form and docs page come."""

import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from config.settings import parse_duration_s
from connectors.http.place import Place, parse_host, parse_url
from connectors.http.tls import Identity, identity_problem

MAX_TIMEOUT_S: Final = 25.0
MIN_TIMEOUT_S: Final = 0.5
MAX_BOOTSTRAP: Final = 16
NAMED_KEYS: Final = ("tenant", "event_id", "aggregate_id")

_TOPIC: Final = re.compile(r"(?!\.{1,2}\Z)[a-zA-Z0-9._-]{1,249}")

Compression: TypeAlias = Literal["lz4", "zstd", "gzip", "none"]
Sasl: TypeAlias = Literal["none", "plain", "scram-sha-256", "scram-sha-512", "oauthbearer"]


def parse_place(text: str) -> tuple[str, int]:
    """`host:port`, `[v6 address]:port`. Raises ValueError."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text.strip()[:100]!r}: write host:port, such as kafka-1.acme.example:9093")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host.isprintable() or (":" in host and not bracketed):
        raise ValueError("an IPv6 address stands in brackets: [2001:db8::1]:9093")
    return parse_host(host[1:-1] if bracketed else host, bracketed=bracketed), int(port)


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    bootstrap: str = Field(
        description="Where the cluster is first asked, `host:port` separated by commas, at most 16. These and the "
        "brokers that the cluster advertises must be publicly reachable.",
        examples=["kafka-1.acme.example:9093,kafka-2.acme.example:9093"],
    )
    topic: str = Field(
        description="The topic that events are written to. It must be there: none is ever made.",
        examples=["orders"],
    )
    key: str = Field(
        default="aggregate_id",
        description="The record's key, which chooses the partition as Java clients do: `tenant`, `event_id`, "
        "`aggregate_id`, or an expression of filters that gives a text. An empty one is no key: such records are "
        "spread.",
        examples=["aggregate_id", "payload.customer.id"],
    )
    compression: Compression = Field(default="lz4", description="How batches are compressed: lz4, zstd, gzip or none.")
    timeout: str = Field(
        default="15s",
        description="Total time for one attempt: connecting, waiting for others of the same batch (at most 100 ms) and "
        "the answer of all in-sync replicas. At most 25s.",
        examples=["15s"],
    )
    tls: bool = Field(
        default=True, description="Clear text (false) is refused, but for addresses in HEADGATE_EGRESS_ALLOW."
    )
    ca: str = Field(
        default="",
        description="Your own certificate authority (PEM), in the place of those that the system knows.",
        examples=["-----BEGIN CERTIFICATE-----\n…"],
    )
    sasl: Sasl = Field(
        default="none",
        description="How to log in: none (or by client certificate), plain, scram-sha-256, scram-sha-512, oauthbearer.",
    )
    username: str = Field(
        default="", description="Who logs in; for oauthbearer the client's id.", examples=["headgate"]
    )
    token_url: str = Field(
        default="",
        description="Where oauthbearer gets its tokens, by the grant `client_credentials`. Must be https and publicly "
        "reachable.",
        examples=["https://login.acme.example/oauth2/token"],
    )
    scope: str = Field(default="", description="The scope that is asked for with a token.", examples=["kafka"])

    @field_validator("bootstrap")
    @classmethod
    def _bootstrap(cls, text: str) -> str:
        if not 0 < len(text.split(",")) <= MAX_BOOTSTRAP:
            raise ValueError(f"names more than {MAX_BOOTSTRAP} brokers; a few are enough")
        for each in text.split(","):
            parse_place(each)
        return text

    @field_validator("topic")
    @classmethod
    def _topic(cls, text: str) -> str:
        if not _TOPIC.fullmatch(text):
            raise ValueError("can be no topic: 1 to 249 of letters, digits, dots, underscores and hyphens")
        return text

    @field_validator("key")
    @classmethod
    def _key(cls, text: str) -> str:
        if not text.strip():
            raise ValueError(f"is empty: write one of {', '.join(NAMED_KEYS)}, or an expression")
        return text

    @field_validator("timeout")
    @classmethod
    def _timeout(cls, text: str) -> str:
        if not MIN_TIMEOUT_S <= parse_duration_s(text) <= MAX_TIMEOUT_S:
            raise ValueError(f"must be between {MIN_TIMEOUT_S * 1000:g}ms and {MAX_TIMEOUT_S:g}s")
        return text

    @field_validator("ca")
    @classmethod
    def _ca(cls, text: str) -> str:
        try:
            if text:
                x509.load_pem_x509_certificates(text.encode())
        except ValueError:
            raise ValueError("not a PEM certificate") from None
        return text

    @model_validator(mode="after")
    def _login(self) -> "Options":
        if self.ca and not self.tls:
            raise ValueError("ca: is of no use without tls")
        if bool(self.username) != (self.sasl != "none"):
            raise ValueError("sasl and username: give both or neither")
        if bool(self.token_url) != (self.sasl == "oauthbearer"):
            raise ValueError("token_url: belongs to sasl: oauthbearer, and to nothing else")
        if self.scope and not self.token_url:
            raise ValueError("scope: belongs to token_url")
        if self.token_url:
            parse_url(self.token_url)
        return self

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        return tuple(parse_place(each) for each in self.bootstrap.split(","))

    @property
    def token_place(self) -> Place | None:
        return parse_url(self.token_url) if self.token_url else None

    @property
    def timeout_s(self) -> float:
        """Rounded to a tenth: timeouts are looked at that often."""
        return round(parse_duration_s(self.timeout), 1)

    @property
    def expressions(self) -> Mapping[str, str]:
        return {} if self.key in NAMED_KEYS else {"key": self.key}


class Secrets(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    password: SecretStr | None = Field(
        default=None,
        description="The password of `username`; for oauthbearer the client's secret.",
        examples=["…"],
    )
    client_cert: SecretStr | None = Field(
        default=None,
        description="A client certificate (PEM, with its chain) for brokers that ask for one (mTLS).",
        examples=["-----BEGIN CERTIFICATE-----\n…"],
    )
    client_key: SecretStr | None = Field(
        default=None,
        description="The private key of `client_cert` (PEM, without a pass phrase).",
        examples=["-----BEGIN PRIVATE KEY-----\n…"],
    )

    @model_validator(mode="after")
    def _identity(self) -> "Secrets":
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("client_cert and client_key: give both or neither")
        if (identity := self.identity) is not None and (
            problem := identity_problem(identity.certificate, identity.key)
        ):
            raise ValueError(problem)
        return self

    @property
    def identity(self) -> Identity | None:
        if self.client_cert is None or self.client_key is None:
            return None
        return Identity(self.client_cert.get_secret_value(), self.client_key.get_secret_value())
