"""What an answer of BigQuery, or the lack of one, means: verdict, fault and code.

Every gRPC status, every error of the Storage Write API and the errors of the REST API have their place here, by number
and name, so that this module needs none of their libraries. What only a person on the tenant's side can mend (rights, a
table, a column of the wrong type) is tried again: a late grant must not kill a backlog.
"""

import re
from collections.abc import Mapping
from typing import Final

from schemas.outcome import Fault as Whose
from schemas.outcome import Outcome, reject, retry

# A metric label: closed.
CODES: Final = {
    "ok": "The row is in the table.",
    "refused": "BigQuery does not take this row.",
    "timestamp": "A time of the event is outside the years 1 to 9999, which no TIMESTAMP holds.",
    "too_large": "The row has more than 9 MiB.",
    "denied": "BigQuery accepts neither the credentials nor their rights. Tried again: grant them.",
    "credentials": "No key was given, and the worker's own credentials are not for destinations.",
    "not_found": "The project, the dataset or the table is not there. Tried again: create it.",
    "schema": "The table's columns are not those that are written. Tried again: mend the table.",
    "invalid": "BigQuery does not take what was asked, though no single row is to blame, such as a table with a column "
    "that must be filled and is none of ours.",
    "encryption": "The table's own encryption key cannot be used.",
    "throttled": "A quota is used up; BigQuery asks to come back later.",
    "stream": "The stream that rows are written to is at its end, or has lost its place. Another one is opened.",
    "unavailable": "BigQuery cannot be reached, or says that it is not available.",
    "server_error": "Another error of BigQuery's.",
    "protocol": "The answer is none to what was asked.",
    "timeout": "Not all was stored within the destination's timeout; what is left was not.",
    "in_doubt": "The answer did not come, so the row may be stored. BigQuery is asked before it is sent again.",
    "stream_lost": "The row may be stored: the answer did not come, and BigQuery no longer knows the stream that it "
    "was sent to, such as after its table was deleted. Not tried again.",
    "connector_error": "An error on our side, of which we have been told; costs no attempt.",
    "closed": "The worker closed the destination while it was stopping or reconfigured; costs no attempt.",
}

EVENT: Final = frozenset({"refused", "timestamp", "too_large"})
# Nobody knows whether the table holds the row.
UNSURE: Final = frozenset({"in_doubt", "stream_lost"})
_REJECTED: Final = EVENT | {"credentials", "stream_lost"}
_OURS: Final = frozenset({"connector_error", "closed"})

# By the names of gRPC's status codes.
STATUSES: Final[Mapping[str, str]] = {
    "OK": "protocol",  # it ended well, before all was answered
    "CANCELLED": "unavailable",
    "UNKNOWN": "server_error",
    "INVALID_ARGUMENT": "invalid",
    "DEADLINE_EXCEEDED": "timeout",
    "NOT_FOUND": "not_found",
    "ALREADY_EXISTS": "stream",
    "PERMISSION_DENIED": "denied",
    "RESOURCE_EXHAUSTED": "throttled",
    "FAILED_PRECONDITION": "stream",
    "ABORTED": "unavailable",
    "OUT_OF_RANGE": "stream",
    "UNIMPLEMENTED": "protocol",
    "INTERNAL": "server_error",
    "UNAVAILABLE": "unavailable",
    "DATA_LOSS": "server_error",
    "UNAUTHENTICATED": "denied",
}
# Only a server that has looked at the request says so: what had no answer by then was not stored. The others may come
# of a connection, or of something on the way, when the rows are long in the table.
ANSWERS: Final = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "UNIMPLEMENTED",
    }
)

# By the names of `StorageError.StorageErrorCode`; they say it more exactly than the status that they come with.
STORAGE_ERRORS: Final[Mapping[str, str]] = {
    "STORAGE_ERROR_CODE_UNSPECIFIED": "",  # as the status says
    "TABLE_NOT_FOUND": "not_found",
    "STREAM_ALREADY_COMMITTED": "stream",
    "STREAM_NOT_FOUND": "stream",
    "INVALID_STREAM_TYPE": "stream",
    "INVALID_STREAM_STATE": "stream",
    "STREAM_FINALIZED": "stream",
    "SCHEMA_MISMATCH_EXTRA_FIELDS": "schema",
    "OFFSET_ALREADY_EXISTS": "stream",
    "OFFSET_OUT_OF_RANGE": "stream",
    "CMEK_NOT_PROVIDED": "encryption",
    "INVALID_CMEK_PROVIDED": "encryption",
    "CMEK_ENCRYPTION_ERROR": "encryption",
    "KMS_SERVICE_ERROR": "encryption",
    "KMS_PERMISSION_DENIED": "encryption",
}

# Of the REST API (tables), by `reason`, as its documentation lists them; a reason that is not here goes by the status.
REASONS: Final[Mapping[str, str]] = {
    "accessDenied": "denied",
    "backendError": "unavailable",
    "billingNotEnabled": "denied",
    "billingTierLimitExceeded": "throttled",
    "blocked": "denied",
    "duplicate": "schema",
    "internalError": "server_error",
    "invalid": "invalid",
    "invalidQuery": "invalid",
    "invalidUser": "denied",
    "jobRateLimitExceeded": "throttled",
    "notFound": "not_found",
    "notImplemented": "protocol",
    "proxyAuthenticationRequired": "unavailable",
    "quotaExceeded": "throttled",
    "rateLimitExceeded": "throttled",
    "resourceInUse": "unavailable",
    "resourcesExceeded": "throttled",
    "responseTooLarge": "protocol",
    "stopped": "unavailable",
    "tableUnavailable": "unavailable",
    "timeout": "timeout",
}


class Fault(Exception):
    """Why something could not be done: a code of `CODES`, and more for the tenant, which quotes no value of an answer.

    `retry_after_s` is what BigQuery asks for; `answered`: what had no answer was not stored; `no_dataset`: it is the
    dataset that was not found.
    """

    def __init__(self, code: str, detail: str = "", *, retry_after_s: float = 0.0, answered: bool = False) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail or CODES[code]
        self.retry_after_s = retry_after_s
        self.answered = answered
        self.no_dataset = False

    @property
    def outcome(self) -> Outcome:
        whose: Whose = "event" if self.code in EVENT else "platform" if self.code in _OURS else "destination"
        if self.code in _REJECTED:
            return reject(whose, self.code, self.detail)
        return retry(whose, self.code, self.detail, retry_after_s=self.retry_after_s)


def of_status(status: str, storage_error: str = "", *, doing: str, retry_after_s: float = 0.0) -> Fault:
    """Of a gRPC status and, where one came with it, an error of the Storage Write API, both by name."""
    code = STORAGE_ERRORS.get(storage_error) or STATUSES[status]
    said = f"{status} ({storage_error})" if storage_error else status
    return Fault(
        code,
        f"{doing}: BigQuery answered {said}. {CODES[code]}",
        retry_after_s=retry_after_s,
        answered=status in ANSWERS,
    )


def of_rest(status: int, reason: str, *, doing: str, retry_after_s: float = 0.0) -> Fault:
    """Of an answer of the REST API."""
    code = REASONS.get(reason) or _of_http(status)
    said = f"{status} ({reason})" if reason in REASONS else str(status)
    return Fault(code, f"{doing}: BigQuery answered {said}. {CODES[code]}", retry_after_s=retry_after_s)


def _of_http(status: int) -> str:
    match status:
        case 401 | 403:
            return "denied"
        case 404:
            return "not_found"
        case 408:
            return "timeout"
        case 409 | 412:
            return "schema"
        case 429:
            return "throttled"
        case _ if status >= 500:
            return "unavailable"
        case _:
            return "invalid" if status >= 400 else "protocol"


# ---------------------------------------------------------------- refused rows

_WORD: Final = re.compile(r"\w+")


def refusal(error: str, message: str, columns: tuple[str, ...]) -> str:
    """The reason of a refused row, which may be kept in the open: the error's name, and the column that it names."""
    words = set(_WORD.findall(message))
    named = [column for column in columns if column in words]
    return f"{error}:{named[0]}" if len(named) == 1 else error


def refused(reason: str, answer: bytes = b"") -> Outcome:
    """Of a reason that was kept: what `refusal` made, or the code of a row that no table can hold."""
    if reason in CODES:
        return Fault(reason).outcome
    error, _, column = reason.partition(":")
    where = f"the column {column} of this row" if column else "this row"
    return reject("event", "refused", f"BigQuery does not take {where} ({error})", answer=answer)
