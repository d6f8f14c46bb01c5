"""What a BigQuery destination is told: the only declaration, from which validation, form and docs page come."""

import re
from typing import Final, Literal, TypeAlias

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from config.settings import parse_bytes, parse_duration_s

MAX_TIMEOUT_S: Final = 300.0
MIN_TIMEOUT_S: Final = 0.5
MAX_LINGER_S: Final = 900.0
MIN_BATCH_BYTES: Final = 64 * 1024
MAX_BATCH_BYTES: Final = 32 * 1024 * 1024
# The one world of Google's in which these endpoints are: another's keys would be of use to nobody here.
UNIVERSE: Final = "googleapis.com"

_PROJECT: Final = re.compile(r"(?:[a-z0-9.-]{1,63}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
_NAME: Final = re.compile(r"[A-Za-z0-9_]{1,1024}")
MAX_TABLE_CHARACTERS: Final = 128

Layout: TypeAlias = Literal["wide", "per_type"]


class ServiceAccount(Struct, frozen=True):
    """What is read of a service account's key. What else the file holds, such as `token_uri`, is never looked at:
    tokens are signed here, and nobody is asked for one."""

    client_email: str
    private_key_id: str
    private_key: str
    type: Literal["service_account"]
    universe_domain: str = UNIVERSE

    def __repr__(self) -> str:
        return f"ServiceAccount({self.client_email!r})"


_decode_account: Final = msgspec.json.Decoder(ServiceAccount).decode


def parse_account(text: str) -> ServiceAccount:
    """Of the JSON that Google gives out. Raises ValueError, which quotes nothing of it."""
    try:
        account = _decode_account(text)
    except msgspec.ValidationError as fault:
        raise ValueError(f"not the key of a service account: {str(fault).partition(' - ')[0]}") from None
    except msgspec.DecodeError:
        raise ValueError("not the key of a service account: give the JSON file that Google made, whole") from None
    if account.universe_domain != UNIVERSE:
        raise ValueError(f"universe_domain: only {UNIVERSE} is served")
    if not account.client_email.isprintable() or "@" not in account.client_email:
        raise ValueError("client_email: not the address of a service account")
    try:
        key = load_pem_private_key(account.private_key.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("private_key: not a private key (PEM, without a pass phrase)") from None
    if not isinstance(key, RSAPrivateKey):
        raise ValueError("private_key: not an RSA key")
    return account


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    project: str = Field(description="The id of the project that the dataset is in.", examples=["acme-analytics"])
    dataset: str = Field(
        description="The dataset that events are written to. It must be there: none is ever made.",
        examples=["product_events"],
    )
    table: str = Field(
        default="events",
        description="The table; with the layout `per_type`, what the name of each table begins with.",
        examples=["events"],
    )
    layout: Layout = Field(
        default="wide",
        description="`wide`: one table for all. `per_type`: one for each event type, such as `events_invoice_paid`.",
    )
    create_tables: bool = Field(
        default=True,
        description="Whether missing tables are made (a partition for each day of `occurred_at`, clustered by "
        "`event_type`), and missing columns added.",
    )
    flush_interval: str = Field(
        default="10s",
        description="How long events are gathered at most before they are written. From 1s to 15m.",
        examples=["10s"],
    )
    flush_size: str = Field(
        default="8MiB",
        description="How much is gathered at most before it is written. From 64KiB to 32MiB.",
        examples=["8MiB"],
    )
    timeout: str = Field(
        default="60s",
        description="Total time for one attempt to write what was gathered. At most 5m.",
        examples=["60s"],
    )

    @field_validator("project")
    @classmethod
    def _project(cls, text: str) -> str:
        if not _PROJECT.fullmatch(text):
            raise ValueError("can be no project's id (not its name, and not its number), such as acme-analytics")
        return text

    @field_validator("dataset")
    @classmethod
    def _dataset(cls, text: str) -> str:
        if not _NAME.fullmatch(text):
            raise ValueError("can be no dataset: letters, digits and underscores, without the project")
        return text

    @field_validator("table")
    @classmethod
    def _table(cls, text: str) -> str:
        if not _NAME.fullmatch(text) or len(text) > MAX_TABLE_CHARACTERS:
            raise ValueError(f"can be no table: 1 to {MAX_TABLE_CHARACTERS} letters, digits and underscores")
        return text

    @field_validator("flush_interval")
    @classmethod
    def _flush_interval(cls, text: str) -> str:
        if not 1 <= parse_duration_s(text) <= MAX_LINGER_S:
            raise ValueError("must be between 1s and 15m")
        return text

    @field_validator("flush_size")
    @classmethod
    def _flush_size(cls, text: str) -> str:
        if not MIN_BATCH_BYTES <= parse_bytes(text) <= MAX_BATCH_BYTES:
            raise ValueError("must be between 64KiB and 32MiB")
        return text

    @field_validator("timeout")
    @classmethod
    def _timeout(cls, text: str) -> str:
        if not MIN_TIMEOUT_S <= parse_duration_s(text) <= MAX_TIMEOUT_S:
            raise ValueError(f"must be between {MIN_TIMEOUT_S * 1000:g}ms and {MAX_TIMEOUT_S:g}s")
        return text

    @property
    def timeout_s(self) -> float:
        return parse_duration_s(self.timeout)


class Secrets(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    service_account: SecretStr | None = Field(
        default=None,
        description="The key of the service account that writes: the JSON file, whole. Without one the worker's own "
        "credentials are used, if whoever runs it allows that.",
        examples=['{"type": "service_account", …}'],
    )

    @field_validator("service_account")
    @classmethod
    def _service_account(cls, text: SecretStr | None) -> SecretStr | None:
        if text is not None:
            parse_account(text.get_secret_value())
        return text

    @property
    def account(self) -> ServiceAccount | None:
        return parse_account(self.service_account.get_secret_value()) if self.service_account is not None else None
