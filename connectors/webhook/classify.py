"""What an answer means: verdict, fault and code (design, section 5)."""

from collections.abc import Set
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final, assert_never

from connectors.http.answer import Answer
from schemas.outcome import Fault, Outcome, delivered, reject, retry

# A metric label: closed.
CODES: Final = {
    "ok": "The receiver answered 2xx.",
    "request_timeout": "The receiver answered 408.",
    "too_early": "The receiver answered 425.",
    "throttled": "The receiver answered 429; Retry-After is kept to.",
    "server_error": "The receiver answered 5xx.",
    "gone": "The receiver answered 410: the destination is disabled.",
    "redirect": "The receiver answered 3xx; redirects are never followed. Use the final URL.",
    "denied": "The receiver answered 401 or 403: it does not accept the headers or the signature.",
    "refused": "The receiver answered another 4xx.",
    "also": "The receiver answered a status that the destination lists in retry.also.",
    "timeout": "No complete answer within the destination's timeout.",
    "dns": "The host's name does not resolve.",
    "connect_refused": "Nothing listens at the host's address and port.",
    "unreachable": "No address of the host could be reached.",
    "reset": "The connection ended before the answer was complete.",
    "tls": "The TLS handshake failed: the certificate is invalid, expired, or for another name, or TLS is too old.",
    "client_certificate": "The client certificate and key of the destination cannot be used.",
    "protocol": "The answer is not HTTP/1.1, or its status is none of 200 to 599.",
    "headers_too_large": "The answer's headers exceed 16 KiB.",
    "egress_blocked": "The host's address is not public, or http was used instead of https.",
    "unsigned": "The destination has no live signing secret. Ours to mend; nothing is sent unsigned, costs no attempt.",
    "no_resources": "The worker has no socket left. Ours to mend; costs no attempt.",
    "closed": "The worker closed the destination while it was stopping or reconfigured; costs no attempt.",
}

MAX_RETRY_AFTER_S: Final = 10 * 366 * 86400.0
# What most receivers answer: an outcome is frozen, so one of each serves all.
_WITHOUT_BODY: Final = {status: delivered(status=status) for status in range(200, 300)}


def classify(answer: Answer, at_ms: int, retry_also: Set[int]) -> Outcome:
    """`at_ms` is the clock of the attempt, from which a Retry-After date is counted; it began before the answer came,
    so the wait is never shorter than what was asked for."""
    status = answer.status
    if 200 <= status < 300:
        return delivered(status=status, answer=answer.excerpt) if answer.excerpt else _WITHOUT_BODY[status]
    if answer.fault:
        return _fault(answer)
    code, fault, again = _meaning(status)
    detail = f"the receiver answered {status}"
    if status in retry_also and not again:
        code, fault, again = "also", "destination", True
    if again:
        after_s = retry_after_s(answer.retry_after, at_ms)
        return retry(fault, code, detail, status=status, answer=answer.excerpt, retry_after_s=after_s)
    return reject(fault, code, detail, status=status, answer=answer.excerpt)


def _meaning(status: int) -> tuple[str, Fault, bool]:
    """Code, fault, and whether to try again."""
    match status:
        case 408:
            return "request_timeout", "destination", True
        case 425:
            return "too_early", "destination", True
        case 429:
            return "throttled", "destination", True
        case 410:
            return "gone", "destination", False
        case 401 | 403:
            return "denied", "destination", False
        case 400 | 413 | 415 | 422:
            return "refused", "event", False
        case _:
            if 500 <= status < 600:
                return "server_error", "destination", True
            if 300 <= status < 400:
                return "redirect", "destination", False
            return "refused", "destination", False


def _fault(answer: Answer) -> Outcome:
    fault = answer.fault
    match fault:
        case "egress_blocked":
            return reject("destination", fault, answer.detail)
        case "client_identity":
            return reject("destination", "client_certificate", answer.detail)
        case "no_resources" | "closed":
            return retry("platform", fault, answer.detail)
        case "dns" | "connect_refused" | "unreachable" | "tls" | "timeout" | "reset" | "protocol" | "headers_too_large":
            return retry("destination", fault, answer.detail)
        case "":
            raise AssertionError("an answer without a fault has a status")
        case _:
            assert_never(fault)


def retry_after_s(text: str, at_ms: int) -> float:
    """Seconds of a Retry-After header, given as seconds or as an HTTP date; 0 for none, the past, or nonsense."""
    if not text:
        return 0.0
    if text.isascii() and text.isdigit():
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(text)
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        wait_s = at.timestamp() - at_ms / 1000
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)
