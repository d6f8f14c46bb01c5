"""What a Kafka destination can be told, and what it is told back."""

import pytest
import trustme
from pydantic import ValidationError

from cli.apply import RULES
from config.document import DocumentError, parse_document
from connectors.kafka.connector import SPEC
from connectors.kafka.options import Options, Secrets
from schemas.ids import Vendor

GIVEN = {"bootstrap": "kafka-1.acme.example:9093", "topic": "orders"}


@pytest.mark.parametrize(
    ("bootstrap", "places"),
    [
        ("kafka-1.acme.example:9093", (("kafka-1.acme.example", 9093),)),
        ("B.example:1, c.example:65535", (("b.example", 1), ("c.example", 65535))),
        ("[2001:DB8::1]:9093", (("2001:db8::1", 9093),)),
        ("bücher.example:9093", (("xn--bcher-kva.example", 9093),)),
        ("0x5db8d70e:9093", (("93.184.215.14", 9093),)),
    ],
)
def test_a_broker_is_read_as_it_will_be_dialled(bootstrap: str, places: tuple[tuple[str, int], ...]) -> None:
    assert Options.model_validate({**GIVEN, "bootstrap": bootstrap}).places == places


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bootstrap": "kafka-1.acme.example"}, "write host:port"),
        ({"bootstrap": "a.example:0"}, "write host:port"),
        ({"bootstrap": "a.example:٣"}, "write host:port"),
        ({"bootstrap": "2001:db8::1:9093"}, "in brackets"),
        ({"bootstrap": ",".join(["a.example:1"] * 17)}, "at most 16|more than 16"),
        ({"bootstrap": "a b.example:1"}, "not a host name"),
        ({"topic": "or/ders"}, "can be no topic"),
        ({"topic": ".."}, "can be no topic"),
        ({"topic": "x" * 250}, "can be no topic"),
        ({"key": " "}, "is empty"),
        ({"timeout": "26s"}, "between"),
        ({"ca": "no certificate"}, "not a PEM certificate"),
        ({"compression": "snappy"}, "lz4"),
        ({"sasl": "plain"}, "give both or neither"),
        ({"username": "acme"}, "give both or neither"),
        ({"sasl": "oauthbearer", "username": "acme"}, "token_url"),
        ({"sasl": "plain", "username": "a", "token_url": "https://a.example/"}, "token_url"),
        ({"sasl": "oauthbearer", "username": "a", "token_url": "ftp://a.example/"}, "https://"),
        ({"scope": "kafka"}, "scope"),
    ],
)
def test_a_fault_says_what_to_do(change: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Options.model_validate({**GIVEN, **change})


def test_a_certificate_comes_with_its_own_key() -> None:
    authority = trustme.CA()
    one, other = (authority.issue_cert("client.acme.example") for _ in range(2))

    def secrets(cert: trustme.LeafCert, key: trustme.LeafCert) -> Secrets:
        chain = b"".join(blob.bytes() for blob in cert.cert_chain_pems)
        return Secrets.model_validate(
            {"client_cert": chain.decode(), "client_key": key.private_key_pem.bytes().decode()}
        )

    assert secrets(one, one).identity is not None
    with pytest.raises(ValidationError, match="is not the key"):
        secrets(one, other)
    with pytest.raises(ValidationError, match="both or neither"):
        Secrets.model_validate({"client_cert": "x"})


def faults(key: str) -> list[str]:
    text = (
        "tenants:\n  - externalId: acme\n    destinations:\n      - id: sink\n        type: kafka\n"
        f"        options: {{bootstrap: 'k.example:9093', topic: orders, key: '{key}'}}\n"
    )
    try:
        parse_document(text, file="f.yaml", rules=RULES, env={}, vendors=[Vendor("default")])
    except DocumentError as fault:
        return [str(one) for one in fault.faults]
    return []


@pytest.mark.parametrize("key", ["tenant", "event_id", "aggregate_id", "payload.customer.id", 'type + "/" + id'])
def test_a_key_that_gives_a_text_is_taken(key: str) -> None:
    assert faults(key) == []


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("payload.total > 100", "f.yaml:6:83: tenants[0].destinations[0].options.key: column 15: the expression gives"),
        ("schemaVersion", "f.yaml:6:69: tenants[0].destinations[0].options.key: column 1: the expression gives int"),
        ("tennant", "f.yaml:6:69: tenants[0].destinations[0].options.key: column 1:"),
        ("payload.", "f.yaml:6:77: tenants[0].destinations[0].options.key: column 9:"),
    ],
)
def test_a_key_at_fault_is_told_at_its_place_when_it_is_applied(key: str, told: str) -> None:
    (found,) = faults(key)
    assert found.startswith(told), found


def test_what_will_be_dialled_is_named_by_its_option() -> None:
    token = {"sasl": "oauthbearer", "username": "acme", "token_url": "https://login.example/token"}
    options = Options.model_validate({**GIVEN, "tls": False, **token})
    assert SPEC.dials(options) == {
        "bootstrap": ("kafka-1.acme.example", False),
        "token_url": ("login.example", True),
    }
