"""Where the demo's events should arrive and how: config.yaml said again in plain Python, to check the product by."""

import json
import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec import Struct

from dev.inbox import ACCEPT, Refuse, Script, fail_first

TENANTS: Final = ("acme", "acme2", "ACME", "globex", "hooli", "initech", "umbrella", "soylent", "tyrell", "wonka")
FAILS_FIRST: Final = 4
"""Too few for the breaker, which opens at 10 attempts of which half failed."""
REFUSAL: Final = 422
"""Says that the event is at fault. A 403 would be the destination's fault: after ten of them its breaker opens."""

Wants = Callable[[str, Mapping[str, Any]], bool]


class Place(Struct, frozen=True):
    """One destination of one tenant. `wants` says by type and payload which events it should get."""

    tenant: str
    destination: str
    path: str
    secret: str
    """The name of the variable that holds its signing secret."""
    wants: Wants
    script: Script = ACCEPT
    dead: bool = False
    """Whether what it gets ends as dead letters."""
    failures: int = 0
    """The place fails so many requests, then answers well."""
    redacts_card: bool = False


def _all(_type: str, _payload: Mapping[str, Any]) -> bool:
    return True


def _big(event_type: str, payload: Mapping[str, Any]) -> bool:
    return (
        (event_type.startswith("order.") or event_type == "invoice.paid")
        and payload["total"] > 100
        and payload["country"] in ("CH", "DE")
    )


def _people(event_type: str, _payload: Mapping[str, Any]) -> bool:
    return event_type.startswith("user.")


def _money(event_type: str, _payload: Mapping[str, Any]) -> bool:
    return event_type.startswith("invoice.") or event_type == "subscription.renewed"


PLACES: Final = (
    Place("acme", "hook", "/acme", "DEMO_SECRET_ACME", _all),
    Place("acme2", "hook", "/acme2", "DEMO_SECRET_ACME2", _all),
    Place("ACME", "hook", "/ACME", "DEMO_SECRET_ACME_CORP", _all),
    Place("globex", "big-orders", "/globex", "DEMO_SECRET_GLOBEX", _big, redacts_card=True),
    Place("hooli", "crm", "/hooli-crm", "DEMO_SECRET_HOOLI_CRM", _people),
    Place("hooli", "billing", "/hooli-billing", "DEMO_SECRET_HOOLI_BILLING", _money),
    Place(
        "initech",
        "flaky",
        "/initech",
        "DEMO_SECRET_INITECH",
        _all,
        script=fail_first(FAILS_FIRST, per="path"),
        failures=FAILS_FIRST,
    ),
    Place("umbrella", "closed", "/umbrella", "DEMO_SECRET_UMBRELLA", _all, script=Refuse(REFUSAL), dead=True),
)


class Kind(StrEnum):
    S3 = "s3"
    BIGQUERY = "bigquery"
    KAFKA = "kafka"


class Store(Struct, frozen=True):
    """One destination of one tenant that is no webhook: a bucket, a dataset or a topic that nobody else writes to."""

    tenant: str
    destination: str
    kind: Kind
    shown: str
    wants: Wants = _all


STORES: Final = (
    Store("soylent", "lake", Kind.S3, "S3"),
    Store("tyrell", "warehouse", Kind.BIGQUERY, "BigQuery"),
    Store("wonka", "stream", Kind.KAFKA, "Kafka"),
)


def new_secrets() -> dict[str, str]:
    """A fresh secret of each destination, by the name of its variable."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    account = {
        "type": "service_account",
        "client_email": "headgate@demo.example",
        "private_key_id": secrets.token_hex(8),
        "private_key": key.decode(),
    }
    return {
        **{place.secret: "whsec_" + b64encode(secrets.token_bytes(32)).decode() for place in PLACES},
        "DEMO_S3_KEY_ID": f"AKIA{secrets.token_hex(8).upper()}",
        "DEMO_S3_KEY": secrets.token_urlsafe(30),
        "DEMO_BIGQUERY_KEY": json.dumps(account),
    }
