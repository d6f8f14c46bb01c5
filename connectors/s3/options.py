"""What an S3 destination is told: the only declaration, from which validation, form and docs page come."""

import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from config.settings import parse_bytes, parse_duration_s, show_bytes
from connectors.http.place import Place, parse_url

MIN_TIMEOUT_S: Final = 0.5
MAX_TIMEOUT_S: Final = 25.0
MIN_FLUSH_S: Final = 1.0
MAX_FLUSH_S: Final = 900.0
MIN_FLUSH_BYTES: Final = 64 * 1024
MAX_FLUSH_BYTES: Final = 64 * 1024 * 1024
MAX_FLUSH_EVENTS: Final = 100_000
MAX_PREFIX_BYTES: Final = 512
MAX_TAGS: Final = 10

# What a bucket may be called in a URL, by S3's rules for new ones; those of other kinds of bucket (access points,
# directory buckets) are asked in other ways.
_BUCKET: Final = re.compile(
    r"(?!xn--|sthree-)(?!.*\.\.)"
    r"(?!.*(?:-s3alias|--ol-s3|--x-s3|\.mrap)\Z)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
)
_REGION: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_ROLE: Final = re.compile(r"arn:aws[a-z0-9-]*:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
_EXTERNAL_ID: Final = re.compile(r"[\w+=,.@:/-]{2,1224}", re.ASCII)
_ACCOUNT: Final = re.compile(r"[0-9]{12}")
_KMS_KEY: Final = re.compile(r"[\w:/-]{1,2048}", re.ASCII)
_TAG: Final = re.compile(r"[\w \-.:/=+@]*")
_CREDENTIAL: Final = re.compile(r"[\x21-\x7e]{1,4096}")

Compression: TypeAlias = Literal["gzip", "zstd", "none"]
Encryption: TypeAlias = Literal["bucket", "sse-s3", "sse-kms"]
StorageClass: TypeAlias = Literal[
    "STANDARD",
    "STANDARD_IA",
    "ONEZONE_IA",
    "INTELLIGENT_TIERING",
    "REDUCED_REDUNDANCY",
    "GLACIER_IR",
]


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    bucket: str = Field(
        description="The bucket that objects are written to. It must be there: none is ever made.",
        examples=["acme-events"],
    )
    region: str = Field(description="The region of the bucket.", examples=["eu-central-1"])
    prefix: str = Field(
        default="",
        description="Fixed text that every object's key starts with, as a folder: no slash before or after it.",
        examples=["headgate/orders"],
    )
    endpoint: str = Field(
        default="",
        description="Where an S3-compatible store is asked, in the place of AWS. Must be https and publicly reachable.",
        examples=["https://s3.store.example"],
    )
    path_style: bool = Field(
        default=False,
        description="Name the bucket in the path of the URL and not in the host, as many S3-compatible stores want it.",
    )
    bucket_owner: str = Field(
        default="",
        description="The account that the bucket must belong to: what is written to a bucket of another is refused.",
        examples=["111122223333"],
    )
    compression: Compression = Field(default="gzip", description="How objects are compressed: gzip, zstd or none.")
    flush_interval: str = Field(
        default="60s",
        description="How long after its first event a batch is written at the latest: 1s to 15m.",
        examples=["60s", "5m"],
    )
    flush_size: str = Field(
        default="16MiB",
        description="The size of a batch, before compression, at which it is written sooner: 64KiB to 64MiB.",
        examples=["16MiB"],
    )
    flush_events: int = Field(
        default=10_000,
        ge=1,
        le=MAX_FLUSH_EVENTS,
        description="How many events are written together at most: 1 to 100000.",
    )
    encryption: Encryption = Field(
        default="bucket",
        description="`bucket` leaves encryption to what the bucket is set to; `sse-s3` and `sse-kms` ask for it.",
    )
    kms_key: str = Field(
        default="",
        description="The key of `sse-kms`, as key ID or ARN; without it the account's own for S3.",
        examples=["arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"],
    )
    storage_class: StorageClass = Field(default="STANDARD", description="The storage class of new objects.")
    tags: Mapping[str, str] = Field(
        default_factory=dict,
        max_length=MAX_TAGS,
        description="Tags of new objects, at most 10. They want the permission s3:PutObjectTagging.",
        examples=[{"source": "headgate"}],
    )
    role: str = Field(
        default="",
        description="The ARN of a role that is assumed with the access key; what it may do counts then.",
        examples=["arn:aws:iam::111122223333:role/headgate"],
    )
    external_id: str = Field(
        default="",
        description="The external id that the role's trust policy asks for.",
        examples=["acme-7f3k"],
    )
    sts_endpoint: str = Field(
        default="",
        description="Where the role is assumed, if not at the region's own. Must be https and publicly reachable.",
        examples=["https://sts.store.example"],
    )
    timeout: str = Field(
        default="20s",
        description="Time for one request, from the look-up of the name to the end of the answer: 500ms to 25s.",
        examples=["20s"],
    )

    @field_validator("bucket")
    @classmethod
    def _bucket(cls, text: str) -> str:
        if not _BUCKET.fullmatch(text):
            raise ValueError("can be no bucket: 3 to 63 lower-case letters, digits, hyphens and dots, and no ARN")
        return text

    @field_validator("region")
    @classmethod
    def _region(cls, text: str) -> str:
        if not _REGION.fullmatch(text):
            raise ValueError("can be no region: write one such as eu-central-1")
        return text

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, text: str) -> str:
        if not text:
            return text
        if not text.isprintable() or "\\" in text:
            raise ValueError("holds a backslash or a character that is not printable")
        if any(part in ("", ".", "..") for part in text.split("/")):
            raise ValueError("holds an empty part, `.` or `..` between slashes: write it as folder/folder")
        if len(text.encode()) > MAX_PREFIX_BYTES:
            raise ValueError(f"has more than {MAX_PREFIX_BYTES} bytes")
        return text

    @field_validator("endpoint", "sts_endpoint")
    @classmethod
    def _endpoint(cls, text: str) -> str:
        if text and parse_url(text).path != "/":
            raise ValueError("names a path or a query: write the host alone, such as https://s3.store.example")
        return text

    @field_validator("bucket_owner")
    @classmethod
    def _bucket_owner(cls, text: str) -> str:
        if text and not _ACCOUNT.fullmatch(text):
            raise ValueError("is no account: write its 12 digits in quotes")
        return text

    @field_validator("flush_interval")
    @classmethod
    def _flush_interval(cls, text: str) -> str:
        if not MIN_FLUSH_S <= parse_duration_s(text) <= MAX_FLUSH_S:
            raise ValueError(f"must be between {MIN_FLUSH_S:g}s and {MAX_FLUSH_S / 60:g}m")
        return text

    @field_validator("flush_size")
    @classmethod
    def _flush_size(cls, text: str) -> str:
        if not MIN_FLUSH_BYTES <= parse_bytes(text) <= MAX_FLUSH_BYTES:
            raise ValueError(f"must be between {show_bytes(MIN_FLUSH_BYTES)} and {show_bytes(MAX_FLUSH_BYTES)}")
        return text

    @field_validator("kms_key")
    @classmethod
    def _kms_key(cls, text: str) -> str:
        if text and not _KMS_KEY.fullmatch(text):
            raise ValueError("is no key: write its ID or its ARN")
        return text

    @field_validator("tags")
    @classmethod
    def _tags(cls, tags: Mapping[str, str]) -> Mapping[str, str]:
        for name, value in tags.items():
            if not 0 < len(name) <= 128 or len(value) > 256 or not _TAG.fullmatch(name) or not _TAG.fullmatch(value):
                raise ValueError("a tag has a name of 1 to 128 and a value of at most 256 letters, digits and _.:/=+-@")
            if name.lower().startswith("aws:"):
                raise ValueError("names that start with aws: belong to AWS")
        return tags

    @field_validator("role")
    @classmethod
    def _role(cls, text: str) -> str:
        if text and not _ROLE.fullmatch(text):
            raise ValueError("is no role: write its ARN, such as arn:aws:iam::111122223333:role/headgate")
        return text

    @field_validator("external_id")
    @classmethod
    def _external_id(cls, text: str) -> str:
        if text and not _EXTERNAL_ID.fullmatch(text):
            raise ValueError("is no external id: 2 to 1224 letters, digits and _+=,.@:/-")
        return text

    @field_validator("timeout")
    @classmethod
    def _timeout(cls, text: str) -> str:
        if not MIN_TIMEOUT_S <= parse_duration_s(text) <= MAX_TIMEOUT_S:
            raise ValueError(f"must be between {MIN_TIMEOUT_S * 1000:g}ms and {MAX_TIMEOUT_S:g}s")
        return text

    @model_validator(mode="after")
    def _together(self) -> "Options":
        if self.kms_key and self.encryption != "sse-kms":
            raise ValueError("kms_key: belongs to encryption: sse-kms")
        if not self.role and (self.external_id or self.sts_endpoint):
            raise ValueError("external_id and sts_endpoint: belong to role")
        return self

    @property
    def place(self) -> Place | None:
        return parse_url(self.endpoint) if self.endpoint else None

    @property
    def sts_place(self) -> Place | None:
        return parse_url(self.sts_endpoint) if self.sts_endpoint else None

    @property
    def timeout_s(self) -> float:
        """Rounded to a tenth: timeouts are looked at that often."""
        return round(parse_duration_s(self.timeout), 1)

    @property
    def flush_interval_s(self) -> float:
        return parse_duration_s(self.flush_interval)

    @property
    def flush_bytes(self) -> int:
        return parse_bytes(self.flush_size)


class Secrets(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    access_key_id: SecretStr = Field(
        description="The ID of the access key that writes objects, or that assumes `role`.",
        examples=["AKIAIOSFODNN7EXAMPLE"],
    )
    secret_access_key: SecretStr = Field(
        description="The secret of the access key.",
        examples=["wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"],
    )

    @field_validator("access_key_id", "secret_access_key")
    @classmethod
    def _credential(cls, secret: SecretStr) -> SecretStr:
        if not _CREDENTIAL.fullmatch(secret.get_secret_value()):
            raise ValueError("is empty or holds a space or another character that no access key has")
        return secret
