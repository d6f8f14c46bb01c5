"""How an attempt ended: verdict x fault (design, section 1), made by `delivered`, `retry` and `reject`."""

from typing import Final, Literal, TypeAlias

from msgspec import Struct

Verdict: TypeAlias = Literal["delivered", "retry", "reject"]
Fault: TypeAlias = Literal["", "event", "destination", "platform"]

MAX_DETAIL_BYTES: Final = 512
MAX_EXCERPT_BYTES: Final = 4096


class Outcome(Struct, frozen=True, gc=False):
    """The end of one attempt.

    `code` comes from the kind's closed list (`Spec.codes`) and may be a metric label; `detail` is for the tenant and is
    sealed before it is stored; `answer` is at most 4 KiB of what the far side said; `status` is its status number, 0
    where the protocol has none; `retry_after_s` is a floor for the next attempt.
    """

    verdict: Verdict
    fault: Fault = ""
    code: str = "ok"
    detail: str = ""
    answer: bytes = b""
    status: int = 0
    receipt: str = ""
    retry_after_s: float = 0.0


def delivered(*, code: str = "ok", status: int = 0, answer: bytes = b"", receipt: str = "") -> Outcome:
    return Outcome("delivered", "", code, "", answer[:MAX_EXCERPT_BYTES], status, receipt)


def retry(
    fault: Fault, code: str, detail: str, *, status: int = 0, answer: bytes = b"", retry_after_s: float = 0.0
) -> Outcome:
    return Outcome("retry", fault, code, detail, answer[:MAX_EXCERPT_BYTES], status, "", retry_after_s)


def reject(fault: Fault, code: str, detail: str, *, status: int = 0, answer: bytes = b"") -> Outcome:
    return Outcome("reject", fault, code, detail, answer[:MAX_EXCERPT_BYTES], status)
