"""Every status, error and reason has its meaning here, and comes to an outcome that the kind declares."""

import grpc
import pytest
from google.cloud.bigquery_storage_v1 import types

from connectors.bigquery.classify import (
    ANSWERS,
    CODES,
    EVENT,
    REASONS,
    STATUSES,
    STORAGE_ERRORS,
    UNSURE,
    Fault,
    of_rest,
    of_status,
    refusal,
    refused,
)
from connectors.bigquery.encode import COLUMNS

NAMES = tuple(name for name, _, _ in COLUMNS)


def test_every_status_of_grpc_has_its_place_and_none_is_there_that_it_does_not_have() -> None:
    assert set(STATUSES) == {status.name for status in grpc.StatusCode}
    assert len(STATUSES) == 17
    assert set(STATUSES) > ANSWERS


def test_every_error_of_the_storage_api_has_its_place_and_none_is_there_that_it_does_not_have() -> None:
    assert set(STORAGE_ERRORS) == {code.name for code in types.StorageError.StorageErrorCode}


def test_every_code_that_an_error_comes_to_is_declared() -> None:
    assert {*STATUSES.values(), *STORAGE_ERRORS.values(), *REASONS.values()} - {""} <= set(CODES)
    assert set(CODES) >= UNSURE | EVENT


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("storage_error", ["", *STORAGE_ERRORS])
def test_an_error_of_grpc_is_tried_again_and_says_what_was_answered(status: str, storage_error: str) -> None:
    outcome = of_status(status, storage_error, doing="appending rows", retry_after_s=3).outcome
    assert (outcome.verdict, outcome.fault, outcome.retry_after_s) == ("retry", "destination", 3)
    assert status in outcome.detail
    assert storage_error in outcome.detail


@pytest.mark.parametrize(
    ("status", "storage_error", "code"),
    [
        ("RESOURCE_EXHAUSTED", "", "throttled"),
        ("PERMISSION_DENIED", "", "denied"),
        ("UNAUTHENTICATED", "", "denied"),
        ("NOT_FOUND", "", "not_found"),
        ("NOT_FOUND", "STREAM_NOT_FOUND", "stream"),
        ("INVALID_ARGUMENT", "SCHEMA_MISMATCH_EXTRA_FIELDS", "schema"),
        ("FAILED_PRECONDITION", "KMS_PERMISSION_DENIED", "encryption"),
        ("INVALID_ARGUMENT", "STORAGE_ERROR_CODE_UNSPECIFIED", "invalid"),
    ],
)
def test_the_storage_api_s_own_error_says_it_more_exactly(status: str, storage_error: str, code: str) -> None:
    assert of_status(status, storage_error, doing="x").code == code


@pytest.mark.parametrize("status", ["UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED"])
def test_what_a_connection_may_say_by_itself_is_no_answer(status: str) -> None:
    assert not of_status(status, doing="x").answered


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        (403, "rateLimitExceeded", "throttled"),
        (403, "quotaExceeded", "throttled"),
        (403, "accessDenied", "denied"),
        (403, "", "denied"),
        (401, "", "denied"),
        (404, "notFound", "not_found"),
        (409, "duplicate", "schema"),
        (429, "", "throttled"),
        (500, "internalError", "server_error"),
        (503, "backendError", "unavailable"),
        (502, "made up", "unavailable"),
        (400, "invalid", "invalid"),
        (418, "", "invalid"),
        (302, "", "protocol"),
    ],
)
def test_an_error_of_rest_goes_by_its_reason_and_else_by_its_status(status: int, reason: str, code: str) -> None:
    fault = of_rest(status, reason, doing="making the table events")
    assert fault.code == code
    assert fault.outcome.verdict == "retry"
    assert "made up" not in fault.detail


@pytest.mark.parametrize("code", CODES)
def test_a_code_has_one_verdict_and_whose_fault_it_is(code: str) -> None:
    outcome = Fault(code).outcome
    assert outcome.fault == {
        **dict.fromkeys(EVENT, "event"),
        "connector_error": "platform",
        "closed": "platform",
    }.get(code, "destination")
    assert (outcome.verdict == "reject") == (code in EVENT | {"credentials", "stream_lost"})


def test_the_reason_of_a_refused_row_names_the_column_and_quotes_nothing() -> None:
    reason = refusal("FIELDS_ERROR", "Field payload: no JSON: 4711", NAMES)
    assert reason == "FIELDS_ERROR:payload"
    outcome = refused(reason, b"Field payload: no JSON: 4711")
    assert (outcome.verdict, outcome.fault, outcome.code) == ("reject", "event", "refused")
    assert outcome.detail == "BigQuery does not take the column payload of this row (FIELDS_ERROR)"
    assert b"4711" in outcome.answer  # which is sealed


def test_a_message_that_names_several_columns_or_none_names_none() -> None:
    assert refusal("FIELDS_ERROR", "payload, or metadata", NAMES) == "FIELDS_ERROR"
    assert refusal("ROW_ERROR_CODE_UNSPECIFIED", "", NAMES) == "ROW_ERROR_CODE_UNSPECIFIED"
