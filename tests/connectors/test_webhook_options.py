"""What a webhook destination may be told, and how a refusal reads."""

import base64
import gc

import psutil
import pytest
import trustme
from pydantic import ValidationError

from connectors.egress import Egress
from connectors.registry import KINDS, UnknownKind, spec_of
from connectors.webhook.options import Options, Secrets, generate_secrets, signing_key
from tests.connectors.receiver import OK, answering
from tests.connectors.webhooks import SECRET, deliver, delivery, hook


def _refusal(model: type[Options] | type[Secrets], **values: object) -> str:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(values)
    return str(refused.value)


@pytest.mark.parametrize(
    ("timeout", "seconds"), [("15s", 15), ("25s", 25), ("2500ms", 2.5), ("0.1s", 0.1), ("1.26s", 1.3)]
)
def test_a_timeout_is_a_number_and_a_unit(timeout: str, seconds: float) -> None:
    assert Options(url="https://a.example/", timeout=timeout).timeout_s == seconds


@pytest.mark.parametrize("timeout", ["15", "26s", "0s", "1m", "-1s", "", "1 s", "s", 15, None, "99ms", "1e1s"])
def test_any_other_timeout_is_refused(timeout: object) -> None:
    assert "timeout" in _refusal(Options, url="https://a.example/", timeout=timeout)


def test_the_timeout_is_15_seconds_by_default() -> None:
    assert Options(url="https://a.example/").timeout_s == 15


def test_a_refused_url_is_not_quoted() -> None:
    text = _refusal(Options, url="https://user:canary@a.example/?k=canary")
    assert "user info" in text and "secrets.headers" in text
    assert "canary" not in text


def test_a_query_is_never_shown() -> None:
    assert Options(url="https://a.example/in?token=canary").display_url == "https://a.example/in?…"


@pytest.mark.parametrize("size", [24, 32, 64])
def test_signing_secrets_of_24_to_64_bytes_are_taken(size: int) -> None:
    secret = "whsec_" + base64.b64encode(b"k" * size).decode()
    assert signing_key(secret) == b"k" * size
    assert len(Secrets.model_validate({"signing": [secret, SECRET]}).signing) == 2


@pytest.mark.parametrize(
    "secret",
    ["canary", "whsec_", "whsec_canary!", "whsec_" + base64.b64encode(b"canary" * 3).decode(),
     "whsec_" + base64.b64encode(b"k" * 65).decode(), SECRET.removeprefix("whsec_"), SECRET + "\n"],
)  # fmt: skip
def test_any_other_signing_secret_is_refused_without_being_quoted(secret: str) -> None:
    text = _refusal(Secrets, signing=secret)
    assert "whsec_" in text and "24 to 64" in text
    assert secret not in text.replace("whsec_ and the base64", "")


def test_generated_secrets_differ_and_are_valid() -> None:
    made = {generate_secrets()["signing"] for _ in range(100)}
    assert len(made) == 100
    assert all(len(signing_key(secret)) == 32 for secret in made)


@pytest.mark.parametrize(
    "name",
    ["webhook-id", "Webhook-Signature", "webhook-anything", "headgate-attempt", "Host", "content-length",
     "Content-Type", "transfer-encoding", "Connection", "user-agent", "TE", "Upgrade", "Expect", "keep-alive",
     "proxy-authorization", "x y", "x:", "", "x\r\ny", "ü", "x" * 65],
)  # fmt: skip
def test_headers_that_are_ours_or_https_own_or_no_headers_are_refused(name: str) -> None:
    assert "header" in _refusal(Secrets, headers={name: "value"})


@pytest.mark.parametrize("value", ["", " ", "canary\r\nx: y", "canary\n", "canary\0", "canary ü", " canary", "canary "])
def test_header_values_that_could_break_out_are_refused_without_being_quoted(value: str) -> None:
    text = _refusal(Secrets, headers={"x-key": value})
    assert "x-key" in text
    assert "canary" not in text


def test_headers_are_counted_and_compared_without_case() -> None:
    assert "twice" in _refusal(Secrets, headers={"x-key": "1", "X-Key": "2"})
    assert "more than 32" in _refusal(Secrets, headers={f"x-{n}": "1" for n in range(33)})
    assert "8 KiB" in _refusal(Secrets, headers={f"x-{n}": "1" * 1000 for n in range(9)})


def test_a_client_certificate_needs_its_key_and_the_key_that_fits() -> None:
    authority = trustme.CA()
    one, two = authority.issue_cert("a@a.example"), authority.issue_cert("b@a.example")
    certificate = one.cert_chain_pems[0].bytes().decode()
    key = one.private_key_pem.bytes().decode()
    other = two.private_key_pem.bytes().decode()
    Secrets.model_validate({"client_cert": certificate, "client_key": key})
    assert "both or neither" in _refusal(Secrets, client_cert=certificate)
    assert "both or neither" in _refusal(Secrets, client_key=key)
    for refused in (
        _refusal(Secrets, client_cert=certificate, client_key=other),
        _refusal(Secrets, client_cert=certificate, client_key="canary"),
        _refusal(Secrets, client_cert="canary", client_key=key),
    ):
        assert "client_" in refused
        assert "canary" not in refused and "BEGIN" not in refused


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    assert spec_of("webhook") is KINDS["webhook"]
    with pytest.raises(UnknownKind, match="unknown type 'ftp'; known: bigquery, kafka, s3, webhook"):
        spec_of("ftp")


async def test_ten_thousand_idle_destinations_stay_small(egress: Egress) -> None:
    """At most 4 KB each; measured 1.2 KB. One of them still works."""
    process = psutil.Process()
    async with answering(OK) as receiver:
        hooks = [hook(egress, f"http://127.0.0.1:{receiver.port}/warm-up") for _ in range(1000)]
        gc.collect()
        before = process.memory_info().rss
        hooks += [hook(egress, f"http://127.0.0.1:{receiver.port}/{n}") for n in range(10_000)]
        gc.collect()
        assert process.memory_info().rss - before < 10_000 * 4096
        assert (await deliver(hooks[-1], delivery())).verdict == "delivered"
        assert receiver.connections == 1
