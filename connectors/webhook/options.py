"""What a webhook destination is told: the only declaration, from which validation, form and docs page come."""

import base64
import binascii
import re
import secrets as dice
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator

from config.settings import parse_duration_s
from connectors.http.place import Place, parse_url
from connectors.http.tls import identity_problem

MAX_TIMEOUT_S: Final = 25.0
MIN_TIMEOUT_S: Final = 0.1
SECRET_PREFIX: Final = "whsec_"
MAX_HEADERS: Final = 32
MAX_HEADERS_BYTES: Final = 8 * 1024

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_HEADER_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?")
# Ours, HTTP's own framing, and what belongs to one hop (RFC 9110, 7.6.1).
_RESERVED: Final = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    }
)
_RESERVED_PREFIXES: Final = ("webhook-", "headgate-")


def header_problem(name: str, value: str) -> str | None:
    """Why this cannot be a custom header; None if it can. Quotes no value."""
    if not _HEADER_NAME.fullmatch(name):
        return f"header {name[:80]!r}: not a header name (letters, digits and hyphens, at most 64)"
    if name.lower() in _RESERVED or name.lower().startswith(_RESERVED_PREFIXES):
        return f"header {name}: is set by Headgate or by HTTP itself and cannot be replaced"
    if not _HEADER_VALUE.fullmatch(value):
        return f"header {name}: its value is empty or holds a character that is not printable ASCII"
    return None


def signing_key(text: str) -> bytes:
    """The key bytes of a `whsec_…` secret. Raises ValueError, which quotes nothing of it."""
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(SECRET_PREFIX) or not 24 <= len(key) <= 64:
        raise ValueError(f"must be {SECRET_PREFIX} and the base64 of 24 to 64 bytes; leave it out to have one made")
    return key


def generate_secrets() -> Mapping[str, str]:
    """A signing secret of 32 random bytes, for a destination that was given none."""
    return {"signing": SECRET_PREFIX + base64.b64encode(dice.token_bytes(32)).decode("ascii")}


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    url: str = Field(
        description="Where events are posted. Must be https and publicly reachable; may hold a query, which is shown "
        "as `?…` everywhere. User info (`name:password@`) is refused: use secrets.headers.",
        examples=["https://hooks.acme.example/in"],
    )
    timeout: str = Field(
        default="15s",
        description="Total time for one attempt, from the look-up of the name to the last byte of the answer. "
        "At most 25s.",
        examples=["15s", "2500ms"],
    )

    @field_validator("url")
    @classmethod
    def _url(cls, text: str) -> str:
        parse_url(text)
        return text

    @field_validator("timeout")
    @classmethod
    def _timeout(cls, text: str) -> str:
        if not MIN_TIMEOUT_S <= parse_duration_s(text) <= MAX_TIMEOUT_S:
            raise ValueError(f"{text} is not between {MIN_TIMEOUT_S * 1000:g}ms and {MAX_TIMEOUT_S:g}s")
        return text

    @property
    def place(self) -> Place:
        return parse_url(self.url)

    @property
    def display_url(self) -> str:
        """The URL as it may be shown and logged."""
        return self.place.display

    @property
    def timeout_s(self) -> float:
        """Rounded to a tenth: timeouts are looked at that often."""
        return round(parse_duration_s(self.timeout), 1)


def _live(value: Any) -> Any:
    """One secret or several live ones (newest first): always a tuple."""
    if isinstance(value, str | SecretStr):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class Secrets(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    signing: Annotated[tuple[SecretStr, ...], BeforeValidator(_live)] = Field(
        default=(),
        max_length=8,
        description="Signs every request (HMAC-SHA256): `whsec_` and the base64 of 24 to 64 bytes. Made and shown once "
        "if none is given. During a rotation all live secrets sign, the newest first.",
        examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    )
    headers: Mapping[str, SecretStr] = Field(
        default_factory=dict,
        description="Headers added to every request, such as a token. Their values are secrets. Those of the "
        "signature and of HTTP itself cannot be set.",
        examples=[{"Authorization": "Bearer …"}],
    )
    client_cert: SecretStr | None = Field(
        default=None,
        description="A client certificate (PEM, with its chain) for a receiver that asks for one (mTLS).",
        examples=["-----BEGIN CERTIFICATE-----\n…"],
    )
    client_key: SecretStr | None = Field(
        default=None,
        description="The private key of `client_cert` (PEM, without a pass phrase).",
        examples=["-----BEGIN PRIVATE KEY-----\n…"],
    )

    @field_validator("signing")
    @classmethod
    def _signing(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in secrets:
            signing_key(secret.get_secret_value())
        return secrets

    @field_validator("headers")
    @classmethod
    def _headers(cls, headers: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        if len(headers) > MAX_HEADERS:
            raise ValueError(f"more than {MAX_HEADERS} headers")
        seen: set[str] = set()
        size = 0
        for name, value in headers.items():
            problem = header_problem(name, value.get_secret_value())
            if problem is not None:
                raise ValueError(problem)
            if name.lower() in seen:
                raise ValueError(f"header {name}: given twice")
            seen.add(name.lower())
            size += len(name) + len(value.get_secret_value()) + 4
        if size > MAX_HEADERS_BYTES:
            raise ValueError(f"headers together exceed {MAX_HEADERS_BYTES // 1024} KiB")
        return headers

    @model_validator(mode="after")
    def _identity(self) -> "Secrets":
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("client_cert and client_key: give both or neither")
        if self.client_cert is None or self.client_key is None:
            return self
        problem = identity_problem(self.client_cert.get_secret_value(), self.client_key.get_secret_value())
        if problem:
            raise ValueError(problem)
        return self
