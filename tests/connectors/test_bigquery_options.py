"""What a BigQuery destination may be told, which table a type goes to, and what a row holds."""

import json
import re
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from pydantic import ValidationError

from connectors.bigquery import encode
from connectors.bigquery.encode import LAST_US, MAX_ROW_BYTES, REQUEST_BYTES, row, table_of
from connectors.bigquery.options import Options, Secrets, parse_account
from schemas.delivery import Delivery
from schemas.event import Event
from schemas.ids import DeliveryId, DestinationId, ExternalId, TenantRef, Vendor
from tests.bigquery_proxy import EMAIL, key_file
from tests.contract.far_side import CANARY

LEAST = {"project": "acme-analytics", "dataset": "product_events"}
TYPES = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=200)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("project", "Acme Analytics"),
        ("project", "123456789"),
        ("project", "acme/../other"),
        ("dataset", "acme-analytics.product_events"),
        ("dataset", "a/tables/b"),
        ("table", "events$20260101"),
        ("table", ""),
        ("table", "e" * 129),
        ("layout", "tall"),
        ("flush_interval", "100ms"),
        ("flush_interval", "1h"),
        ("flush_size", "1KiB"),
        ("flush_size", "1GiB"),
        ("timeout", "1h"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(option: str, value: str) -> None:
    Options.model_validate(LEAST)
    with pytest.raises(ValidationError, match=option):
        Options.model_validate({**LEAST, option: value})


def test_a_key_is_read_and_nothing_else_of_its_file() -> None:
    account = parse_account(key_file(token_uri="http://169.254.169.254/token"))
    assert account.client_email == EMAIL
    assert "169.254" not in repr([getattr(account, name) for name in account.__struct_fields__])
    assert CANARY not in repr(account)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSON file"),
        ("{}", "missing required field"),
        (key_file(type="authorized_user"), "service account"),
        (key_file(universe_domain="evil.example"), "only googleapis.com"),
        (key_file(private_key=f"{CANARY}"), "private_key: not a private key"),
        (key_file(client_email=f"{CANARY}"), "client_email"),
    ],
)
def test_a_key_that_is_none_is_refused_and_not_quoted(text: str, why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)) as fault:
        Secrets.model_validate({"service_account": text})
    assert CANARY not in str(fault.value)


def test_a_key_of_another_kind_is_refused() -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ValidationError, match="not an RSA key"):
        Secrets.model_validate({"service_account": key_file(private_key=pem.decode())})


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("invoice.paid", "events_invoice_paid"),
        ("invoice_paid", "events_invoice_paid__bfcdp53tmvstko6t"),
        ("Invoice.Paid", None),
        ("invoice..paid", None),
        ("Rechnung bezahlt: ü", None),
        ("…", None),
    ],
)
def test_a_table_is_named_by_its_type(kind: str, table: str | None) -> None:
    assert table_of("wide", "events", kind) == "events"
    made = table_of("per_type", "events", kind)
    assert re.fullmatch(r"[A-Za-z0-9_]{1,1024}", made)
    assert table is None or made == table
    assert ("__" in made) == (table != "events_invoice_paid")


@given(TYPES, TYPES)
def test_no_two_types_share_a_table_even_where_case_is_ignored(one: str, other: str) -> None:
    tables = {table_of("per_type", "events", kind).lower() for kind in (one, other)}
    assert len(tables) == len({one, other})


def test_types_that_look_alike_do_not_share_a_table() -> None:
    alike = ["a.b", "a_b", "a-b", "A.b", "a.B", "a..b", ".a.b", "a.b.", "a b", "a.b ", "ä.b", "a__b"]
    alike += [table_of("per_type", "x", kind).removeprefix("x_") for kind in alike]
    alike += [kind.replace("_", ".") for kind in alike]
    types = set(alike)
    assert len({table_of("per_type", "events", kind).lower() for kind in types}) == len(types)


# ---------------------------------------------------------------- rows


def delivery(**changed: Any) -> Delivery:
    fields = {
        "eventType": "invoice.paid",
        "payload": Raw(b'{"total": 12.10, "big": 12345678901234567890123}'),
        "eventId": "evt_1",
        "occurredAt": "2026-11-21T09:30:00.123456789+02:00",
        "customerExternalId": "acme",
        **changed,
    }
    tenant = TenantRef(Vendor("default"), ExternalId("acme"))
    return Delivery(tenant, DestinationId("sink"), DeliveryId("dlv_1"), Event(**fields), "t/0/1", 1_790_000_000_123, 0)


def read(content: bytes | str) -> dict[str, Any]:
    assert isinstance(content, bytes)
    return {field.name: value for field, value in encode._Row.FromString(content).ListFields()}


def test_a_row_holds_the_event_and_the_digits_of_its_numbers() -> None:
    assert read(row(delivery())) == {
        "event_id": "evt_1",
        "event_type": "invoice.paid",
        "occurred_at": 1_795_246_200_123_456,
        "customer_external_id": "acme",
        "payload": '{"total": 12.10, "big": 12345678901234567890123}',
        "metadata": "{}",
        "received_at": 1_790_000_000_123_000,
        "delivery_id": "dlv_1",
    }
    assert read(row(delivery(source="billing")))["source"] == "billing"


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("0001-01-01T00:00:00Z", True),
        ("9999-12-31T23:59:59.999999Z", True),
        ("0001-01-01T00:00:00+01:00", False),
        ("9999-12-31T23:59:59-01:00", False),
    ],
)
def test_a_time_that_no_timestamp_holds_rejects_the_row_alone(text: str, fits: bool) -> None:
    assert isinstance(row(delivery(occurredAt=text)), bytes) is fits
    if not fits:
        assert row(delivery(occurredAt=text)) == "timestamp"
    assert row(delivery(occurredAt="9999-12-31T23:59:59.999999Z")) != row(delivery())
    assert LAST_US == 253_402_300_799_999_999


def test_a_row_that_is_larger_than_a_request_is_rejected() -> None:
    assert row(delivery(payload=Raw(json.dumps("x" * MAX_ROW_BYTES).encode()))) == "too_large"


@given(st.lists(st.integers(1, 3 * REQUEST_BYTES // 2), max_size=12))
def test_requests_hold_all_rows_in_order_and_are_no_larger_than_they_must_be(sizes: list[int]) -> None:
    rows = [b"x" * size for size in sizes]
    pieces = list(encode.requests(rows))
    assert [one for piece in pieces for one in piece] == rows
    for piece in pieces:
        assert sum(map(len, piece)) <= REQUEST_BYTES or len(piece) == 1
