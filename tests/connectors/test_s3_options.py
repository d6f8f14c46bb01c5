"""What an S3 destination may be told, what it becomes of it, and what is refused with a reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from connectors.s3.connector import SPEC
from connectors.s3.options import Options, Secrets

GOOD: dict[str, Any] = {"bucket": "acme-events", "region": "eu-central-1"}
ROLE = "arn:aws:iam::111122223333:role/path/headgate"


@pytest.mark.parametrize(
    "more",
    [
        {"bucket": "acme.events.2026"},
        {"prefix": "head gate/é/x=1"},
        {"endpoint": "https://s3.store.example:9000", "path_style": True},
        {"compression": "zstd"},
        {"flush_interval": "1s", "flush_size": "64KiB", "flush_events": 1},
        {"flush_interval": "15m", "flush_size": "64MiB", "flush_events": 100_000},
        {"encryption": "sse-kms", "kms_key": "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"},
        {"encryption": "sse-s3", "storage_class": "GLACIER_IR"},
        {"role": ROLE, "external_id": "acme-7f3k"},
        {"role": "arn:aws-cn:iam::111122223333:role/headgate"},
        {"bucket_owner": "111122223333"},
        {"tags": {"team": "data", "source": ""}},
        {"timeout": "25s"},
    ],
)
def test_it_takes(more: dict[str, Any]) -> None:
    Options.model_validate({**GOOD, **more})


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"bucket": "Acme"}, "bucket"),
        ({"bucket": "a..b"}, "bucket"),
        ({"bucket": "acme/other"}, "bucket"),
        ({"bucket": "arn:aws:s3:::acme"}, "bucket"),
        ({"bucket": "acme--x-s3"}, "bucket"),
        ({"bucket": "acme-s3alias"}, "bucket"),
        ({"bucket": "ac"}, "bucket"),
        ({"region": "eu-central-1.evil.example"}, "region"),
        ({"region": "evil.example/"}, "region"),
        ({"region": ""}, "region"),
        ({"prefix": "/a"}, "prefix"),
        ({"prefix": "a/"}, "prefix"),
        ({"prefix": "a//b"}, "prefix"),
        ({"prefix": "a/../b"}, "prefix"),
        ({"prefix": "."}, "prefix"),
        ({"prefix": "a\nb"}, "prefix"),
        ({"prefix": "a\\b"}, "prefix"),
        ({"prefix": "é" * 257}, "prefix"),
        ({"endpoint": "s3.store.example"}, "endpoint"),
        ({"endpoint": "https://me:secret@s3.store.example"}, "endpoint"),
        ({"endpoint": "https://s3.store.example/path"}, "endpoint"),
        ({"endpoint": "https://s3.store.example/?x=1"}, "endpoint"),
        ({"flush_interval": "500ms"}, "flush_interval"),
        ({"flush_interval": "16m"}, "flush_interval"),
        ({"flush_size": "65MiB"}, "flush_size"),
        ({"flush_size": "1KiB"}, "flush_size"),
        ({"flush_events": 0}, "flush_events"),
        ({"flush_events": 100_001}, "flush_events"),
        ({"compression": "lz4"}, "compression"),
        ({"storage_class": "GLACIER"}, "storage_class"),
        ({"kms_key": "1234"}, "kms_key"),
        ({"encryption": "sse-kms", "kms_key": "a b"}, "kms_key"),
        ({"external_id": "acme-7f3k"}, "role"),
        ({"sts_endpoint": "https://sts.example"}, "role"),
        ({"role": "headgate"}, "role"),
        ({"role": ROLE, "external_id": "a b"}, "external_id"),
        ({"bucket_owner": "1111"}, "bucket_owner"),
        ({"tags": {"aws:x": "y"}}, "tags"),
        ({"tags": {"": "y"}}, "tags"),
        ({"tags": {"x\n": "y"}}, "tags"),
        ({"tags": {str(n): "" for n in range(11)}}, "tags"),
        ({"timeout": "26s"}, "timeout"),
        ({"timeout": "1ms"}, "timeout"),
    ],
)
def test_it_refuses_and_names_the_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Options.model_validate({**GOOD, **more})
    fault = refused.value.errors()[0]
    assert field in f"{fault['loc']} {fault['msg']}"


@pytest.mark.parametrize("key", ["", "a b", "a\r\nx-amz-acl: public-read", "é"])
def test_an_access_key_that_would_be_more_than_one_is_refused_and_not_quoted(key: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Secrets.model_validate({"access_key_id": "AKIA", "secret_access_key": key})
    assert not key or key not in str(refused.value)


def test_how_large_batches_get_is_what_the_options_say() -> None:
    assert SPEC.batching is not None
    told = {**GOOD, "flush_interval": "5m", "flush_size": "32MiB", "flush_events": 7}
    batching = SPEC.batching(Options.model_validate(told))
    assert (batching.linger_s, batching.max_bytes, batching.max_events) == (300.0, 32 << 20, 7)
    default = SPEC.batching(Options.model_validate(GOOD))
    assert (default.linger_s, default.max_bytes, default.max_events) == (60.0, 16 << 20, 10_000)


def test_what_is_dialled_is_what_the_options_name() -> None:
    assert SPEC.dials(Options.model_validate(GOOD)) == {}
    told = {**GOOD, "endpoint": "http://127.0.0.1:9000", "role": ROLE, "sts_endpoint": "https://sts.example"}
    assert SPEC.dials(Options.model_validate(told)) == {
        "endpoint": ("127.0.0.1", False),
        "sts_endpoint": ("sts.example", True),
    }
