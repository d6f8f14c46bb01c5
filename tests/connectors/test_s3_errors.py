"""Every error that S3 documents has its meaning here, and what the far side answers comes to the right end."""

import re

import pytest
from botocore.loaders import Loader
from botocore.retries.standard import ThrottledRetryableChecker, TransientRetryableChecker

from connectors.egress import Egress
from connectors.s3.classify import CODES, ERRORS, UNSURE, Fault, answered
from connectors.s3.connector import SPEC
from tests.connectors.s3s import deliver, delivery, sink
from tests.contract.farsides.s3 import Answer, S3FarSide

CASES = [
    (403, "AccessDenied", "retry", "destination", "denied"),
    (403, "AllAccessDisabled", "retry", "destination", "denied"),
    (403, "InvalidAccessKeyId", "retry", "destination", "credentials"),
    (403, "SignatureDoesNotMatch", "retry", "destination", "credentials"),
    (400, "ExpiredToken", "retry", "destination", "expired_token"),
    (404, "NoSuchBucket", "retry", "destination", "no_bucket"),
    (301, "PermanentRedirect", "retry", "destination", "wrong_region"),
    (400, "AuthorizationHeaderMalformed", "retry", "destination", "wrong_region"),
    (307, "TemporaryRedirect", "retry", "destination", "unavailable"),
    (403, "RequestTimeTooSkewed", "retry", "platform", "clock_skew"),
    (503, "SlowDown", "retry", "destination", "throttled"),
    (503, "ServiceUnavailable", "retry", "destination", "unavailable"),
    (503, "", "retry", "destination", "unavailable"),
    (500, "InternalError", "retry", "destination", "server_error"),
    (502, "", "retry", "destination", "server_error"),
    (400, "KMS.DisabledException", "retry", "destination", "encryption"),
    (400, "KMS.SomethingNew", "retry", "destination", "encryption"),
    (400, "InvalidStorageClass", "retry", "destination", "options"),
    (403, "InvalidObjectState", "retry", "destination", "options"),
    (501, "NotImplemented", "retry", "destination", "incompatible"),
    (400, "BadDigest", "retry", "destination", "transfer"),
    (400, "RequestTimeout", "retry", "destination", "transfer"),
    (409, "ConditionalRequestConflict", "retry", "destination", "conflict"),
    (409, "OperationAborted", "retry", "destination", "conflict"),
    (400, "EntityTooLarge", "reject", "destination", "too_large"),
    (413, "", "reject", "destination", "too_large"),
    (400, "KeyTooLongError", "reject", "event", "key_too_long"),
    (400, "InvalidRequest", "reject", "destination", "refused"),
    (400, "NobodyKnowsThis", "reject", "destination", "refused"),
]


def documented() -> set[str]:
    """The codes that S3's own model lists in words, and those of it and of STS that are errors of an operation."""
    s3 = Loader().load_service_model("s3", "service-2")["shapes"]
    listed = re.findall(r"<i>Code:</i>\s*([A-Z]\w+)\s*<", s3["Error"]["members"]["Code"]["documentation"])
    sts = Loader().load_service_model("sts", "service-2")["shapes"]
    shapes = {name: shape for model in (s3, sts) for name, shape in model.items() if shape.get("exception")}
    return {*listed, *(shape.get("error", {}).get("code", name) for name, shape in shapes.items())} - {"N"}


def test_every_error_that_s3_and_sts_document_has_its_place() -> None:
    found = documented()
    assert found - set(ERRORS) == set()
    assert len(found) > 90
    assert {"SlowDown", "KeyTooLongError", "EncryptionTypeMismatch", "RegionDisabledException"} <= found


def test_what_botocore_would_have_tried_again_is_tried_again() -> None:
    throttled = set(ThrottledRetryableChecker._THROTTLED_ERROR_CODES)
    transient = set(TransientRetryableChecker._TRANSIENT_ERROR_CODES)
    assert {ERRORS[error] for error in throttled} == {"throttled"}
    assert {Fault(ERRORS[error]).outcome.verdict for error in transient} == {"retry"}


def test_every_meaning_is_a_code_that_is_declared_and_has_an_outcome() -> None:
    assert set(ERRORS.values()) <= set(CODES)
    for code in CODES:
        outcome = Fault(code).outcome
        assert outcome.code == code
        assert outcome.detail
    assert SPEC.unsure == UNSURE <= set(CODES)


def test_only_what_may_have_been_stored_is_unsure() -> None:
    assert {"timeout", "reset", "server_error"} <= UNSURE
    assert not UNSURE & {"denied", "throttled", "dns", "connect_refused", "unreachable", "tls", "name_taken", "late"}


def test_what_only_the_tenant_can_mend_kills_no_backlog() -> None:
    mended = ["denied", "credentials", "role", "no_bucket", "wrong_region", "encryption", "options", "account", "tls"]
    assert {Fault(code).outcome.verdict for code in mended} == {"retry"}


@pytest.mark.parametrize(("status", "error", "verdict", "fault", "code"), CASES)
async def test_what_s3_answers_comes_to_the_right_end(
    store: S3FarSide, egress: Egress, status: int, error: str, verdict: str, fault: str, code: str
) -> None:
    store.answers["PutObject"] = [Answer(status, error)]
    connector = sink(egress, store.options(), store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert (outcome.verdict, outcome.fault, outcome.code, outcome.status) == (verdict, fault, code, status)
    assert "canary" not in repr(outcome)
    assert store.operations == ["PutObject"]  # neither tried again nor sent elsewhere
    await connector.close()


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x-amz-bucket-region": "ap-south-1"}, None),
        (
            {},
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>x</Message><Region>ap-south-1</Region></Error>",
        ),
    ],
)
async def test_a_bucket_of_another_region_is_not_followed_there_and_the_outcome_names_it(
    store: S3FarSide, egress: Egress, headers: dict[str, str], body: bytes | None
) -> None:
    where = {"location": f"http://127.0.0.1:{store.port}/elsewhere", **headers}
    store.answers["PutObject"] = [Answer(301, "PermanentRedirect", where, body)]
    connector = sink(egress, store.options(), store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert outcome.code == "wrong_region"
    assert "ap-south-1" in outcome.detail
    assert len(store.requests) == 1
    await connector.close()


def test_what_is_quoted_of_an_answer_is_a_name_that_is_known() -> None:
    message = "User: arn:aws:iam::1:user/canary is not authorized to perform: kms:GenerateDataKey on canary"
    fault = answered(403, "AccessDenied", message, "canary", "canary", "write", "s3:PutObject")
    assert (fault.code, "kms:GenerateDataKey" in fault.detail) == ("encryption", True)
    assert "canary" not in fault.detail
    fault = answered(301, "canary", message, "canary", "", "write", "s3:PutObject")
    assert "canary" not in fault.detail
    assert fault.retry_after_s == 0.0


async def test_an_answer_of_200_that_holds_an_error_is_one(store: S3FarSide, egress: Egress) -> None:
    body = b'<?xml version="1.0"?>\n\n   \n<Error><Code>InternalError</Code><Message>x</Message></Error>'
    store.answers["CompleteMultipartUpload"] = [Answer(200, body=body)]
    connector = sink(egress, store.options(), store.secrets(), compression="none")
    (outcome,) = await deliver(connector, delivery(payload=b'"%b"' % (b"x" * (9 << 20))))
    assert (outcome.verdict, outcome.code) == ("retry", "server_error")
    assert store.objects == {}
    await connector.close()
    assert store.uploads == {}


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"", b"\xff\xfe<Error>"])
async def test_a_200_of_what_is_no_s3_is_no_delivery(store: S3FarSide, egress: Egress, body: bytes) -> None:
    store.answers["PutObject"] = [Answer(200, body=body)]
    connector = sink(egress, store.options(), store.secrets())
    (outcome,) = await deliver(connector, delivery())
    assert outcome.verdict == "retry"
    assert outcome.code in UNSURE
    await connector.close()
