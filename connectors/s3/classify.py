"""What S3's answer, or the lack of one, means: verdict, fault and code, and whether the object may be there.

Every error code that S3 documents has its place here, and so have those of STS and of KMS that come through. What a
person on the tenant's side can mend (rights, a key, a bucket that is not there, an option that it does not take) is
tried again: a late rotation must not kill a backlog. `NoSuchBucket` is one of these: nothing in S3 says that a bucket
will never be there again, and one that was removed by mistake comes back under its name.
"""

import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from connectors.http.answer import Answer
from schemas.outcome import Fault as Whose
from schemas.outcome import Outcome, reject, retry

Step: TypeAlias = Literal["connect", "role", "write", "once", "read", "delete"]

# A metric label: closed.
CODES: Final = {
    "ok": "The object is stored, by this attempt or an earlier one.",
    "denied": "The credentials may not do what is asked. Tried again: grant it.",
    "credentials": "The access key is not known or its secret is wrong. Tried again: give the new one.",
    "expired_token": "The session of the assumed role has ended. Tried again with a new one.",
    "role": "The role could not be assumed. Tried again: mend its trust policy or the external id.",
    "account": "S3 does not serve this account. Tried again.",
    "no_bucket": "The bucket is not there. Tried again: create it.",
    "wrong_region": "The bucket is in another region than the option says. Tried again: correct it.",
    "encryption": "The KMS key cannot be used. Tried again: enable it, or grant its use.",
    "options": "The bucket does not take what the options ask for, such as a storage class or tags. Tried again.",
    "incompatible": "The store does not know something that is asked of it, such as conditional writes. Tried again.",
    "throttled": "S3 asks to come back later.",
    "unavailable": "S3 is not available, or moves the bucket.",
    "server_error": "Another error of S3.",
    "clock_skew": "Our clock and that of S3 differ too much. Ours to mend; costs no attempt.",
    "transfer": "The object did not arrive as it was sent.",
    "conflict": "Something else was done to the object at the same time.",
    "upload_lost": "The parts of the object were removed before it was complete.",
    "name_taken": "Another object has the name. Nothing was overwritten. Ours to mend; costs no attempt.",
    "unverified": "An object has the name, but may not be read to tell whether it is this one: grant s3:GetObject.",
    "too_large": "The store does not take an object of this size: lower flush_size.",
    "key_too_long": "The object's name, with the event's type in it, has more than 1024 bytes.",
    "refused": "The store refuses the request.",
    "protocol": "The answer is not one of S3, or none to what was asked.",
    "timeout": "No complete answer within the destination's timeout.",
    "late": "The batch has more objects than could be written in its time. Tried again; what is stored stays.",
    "dns": "The name of the bucket or of the endpoint does not resolve.",
    "connect_refused": "Nothing listens at the endpoint's address and port.",
    "unreachable": "No address of the endpoint could be reached.",
    "reset": "The connection ended before the answer was complete.",
    "tls": "The TLS handshake failed: the certificate is invalid, expired, or for another name, or TLS is too old.",
    "egress_blocked": "The endpoint's address is not public, or would be spoken to in clear text.",
    "no_resources": "The worker has no socket left. Ours to mend; costs no attempt.",
    "closed": "The worker closed the destination while it was stopping or reconfigured; costs no attempt.",
}

# After these nobody knows whether the object is there.
UNSURE: Final = frozenset({"timeout", "reset", "protocol", "server_error", "unverified", "upload_lost"})

_EVENT: Final = frozenset({"key_too_long"})
_OURS: Final = frozenset({"clock_skew", "name_taken", "no_resources", "closed"})
_REJECTED: Final = frozenset({"key_too_long", "too_large", "refused", "egress_blocked"})

MAX_RETRY_AFTER_S: Final = 86_400.0


class Fault(Exception):
    """Why something could not be done: a code of `CODES`, and more for the tenant, which quotes nothing of an answer.

    `error` is S3's own code, where it is one that is known; `step`: how far it came, for `check`.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        error: str = "",
        status: int = 0,
        retry_after_s: float = 0.0,
        step: Step = "connect",
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail or CODES[code]
        self.error = error
        self.status = status
        self.retry_after_s = retry_after_s
        self.step: Step = step

    @property
    def outcome(self) -> Outcome:
        whose: Whose = "event" if self.code in _EVENT else "platform" if self.code in _OURS else "destination"
        if self.code in _REJECTED:
            return reject(whose, self.code, self.detail, status=self.status)
        return retry(whose, self.code, self.detail, status=self.status, retry_after_s=self.retry_after_s)


_BY_CODE: Final[Mapping[str, tuple[str, ...]]] = {
    "denied": (
        "AccessDenied",
        "AccessDeniedException",
        "AllAccessDisabled",
        "AccessForbidden",
        "InvalidSecurity",
        "MethodNotAllowed",
        "UnauthorizedAccess",
        "UnauthorizedOperation",
        "InvalidPayer",
    ),
    "credentials": (
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidClientTokenId",
        "InvalidToken",
        "AuthFailure",
        "UnrecognizedClientException",
        "CredentialsNotSupported",
        "InvalidIdentityToken",
        "MissingSecurityHeader",
        "MissingAuthenticationToken",
        "IncompleteSignature",
        "XAdminMethodNotSupported",
    ),
    "expired_token": (
        "ExpiredToken",
        "ExpiredTokenException",
        "TokenRefreshRequired",
        "ExpiredTradeInTokenException",
        "InsufficientSessionLifetime",
    ),
    "role": (
        "IDPCommunicationError",
        "IDPRejectedClaim",
        "InvalidAuthorizationMessageException",
        "InvalidContextAssertion",
        "InvalidSubjectCredentials",
        "JWTPayloadSizeExceededException",
        "MalformedPolicyDocument",
        "OutboundWebIdentityFederationDisabledException",
        "PackedPolicyTooLarge",
        "RegionDisabledException",
        "SessionDurationEscalationException",
    ),
    "account": ("AccountProblem", "NotSignedUp", "UserSuspended", "OptInRequired"),
    "no_bucket": ("NoSuchBucket",),
    "wrong_region": (
        "PermanentRedirect",
        "Redirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "InvalidLocationConstraint",
        "InvalidRegion",
        "PermanentRedirectControlError",
        "CrossLocationLoggingProhibited",
    ),
    "encryption": (
        "KMS.DisabledException",
        "KMS.InvalidStateException",
        "KMS.KMSInvalidStateException",
        "KMS.InvalidKeyUsageException",
        "KMS.NotFoundException",
        "KMS.KeyUnavailableException",
        "KMS.OptInRequired",
        "KMS.ThrottlingException",
        "InvalidEncryptionAlgorithmError",
        "EncryptionTypeMismatch",
        "ServerSideEncryptionConfigurationNotFoundError",
    ),
    "options": (
        "InvalidStorageClass",
        "InvalidTag",
        "InvalidArgument",
        "AccessControlListNotSupported",
        "InvalidBucketState",
        "InvalidBucketName",
        "ObjectLockConfigurationNotFoundError",
        "InvalidObjectState",
        "MetadataTooLarge",
    ),
    "incompatible": (
        "NotImplemented",
        "UnsupportedSignature",
        "UnsupportedMediaType",
        "UnsupportedArgument",
        "ClientTokenConflict",
    ),
    "throttled": (
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottled",
        "RequestThrottledException",
        "TooManyRequestsException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "LimitExceededException",
        "TransactionInProgressException",
        "PriorRequestNotComplete",
        "EC2ThrottledException",
        "TooManyRequests",
    ),
    "unavailable": ("ServiceUnavailable", "Busy", "TemporaryRedirect"),
    "server_error": ("InternalError", "InternalFailure", "InternalServerError"),
    "clock_skew": ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"),
    "transfer": (
        "BadDigest",
        "InvalidDigest",
        "IncompleteBody",
        "RequestTimeout",
        "RequestTimeoutException",
        "XAmzContentSHA256Mismatch",
        "MissingContentLength",
        "MissingRequestBodyError",
        "InvalidPart",
        "InvalidPartOrder",
        "EntityTooSmall",
        "ContentSHA256Mismatch",
    ),
    "conflict": (
        "ConditionalRequestConflict",
        "OperationAborted",
        "PreconditionFailed",
        "RestoreAlreadyInProgress",
        "ObjectAlreadyInActiveTierError",
        "ObjectNotInActiveTierError",
        "IdempotencyParameterMismatch",
    ),
    "upload_lost": ("NoSuchUpload",),
    "too_large": ("EntityTooLarge", "MaxMessageLengthExceeded", "TooManyParts", "QuotaExceeded", "InvalidWriteOffset"),
    "key_too_long": ("KeyTooLongError", "KeyTooLong"),
    "refused": ("InvalidRequest", "InvalidURI", "MalformedXML", "InvalidObjectName", "UnexpectedContent"),
    # errors of other requests: no answers to what is asked
    "protocol": (
        "AmbiguousGrantByEmailAddress",
        "AnnotationLimitExceeded",
        "AnnotationNameTooLong",
        "BucketAlreadyExists",
        "BucketAlreadyOwnedByYou",
        "BucketNotEmpty",
        "IllegalVersioningConfigurationException",
        "IncorrectNumberOfFilesInPostRequest",
        "InlineDataTooLarge",
        "InvalidAddressingHeader",
        "InvalidAnnotationName",
        "InvalidPolicyDocument",
        "InvalidPrefix",
        "InvalidRange",
        "InvalidTargetBucketForLogging",
        "MalformedACLError",
        "MalformedPOSTRequest",
        "MaxPostPreDataLengthExceededError",
        "NoLoggingStatusForKey",
        "NoSuchAnnotation",
        "NoSuchBucketPolicy",
        "NoSuchKey",
        "NoSuchLifecycleConfiguration",
        "NoSuchVersion",
        "RequestIsNotMultiPartContent",
        "RequestTorrentOfBucketError",
        "TooManyBuckets",
        "UnresolvableGrantByEmailAddress",
        "UserKeyMustBeSpecified",
    ),
}
ERRORS: Final[Mapping[str, str]] = {error: code for code, errors in _BY_CODE.items() for error in errors}

# What an answer without a code that is known means: those to HEAD have none.
_STATUS: Final[Mapping[int, str]] = {
    301: "wrong_region",
    307: "unavailable",
    400: "refused",
    401: "credentials",
    403: "denied",
    404: "no_bucket",
    405: "denied",
    409: "conflict",
    411: "transfer",
    412: "conflict",
    413: "too_large",
    415: "incompatible",
    429: "throttled",
    501: "incompatible",
    503: "unavailable",
    504: "server_error",
}
_PERMISSION: Final = re.compile(r"\b(?:s3|kms|sts):[A-Z][A-Za-z]{2,40}\b")
_REGION: Final = re.compile(r"[a-z]{2}(?:-[a-z]{1,10}){1,3}-[0-9]{1,2}")


def answered(status: int, error: str, message: str, region: str, retry_after: str, step: Step, needs: str) -> Fault:
    """Of an answer that is an error: its status and, where it has a body, code and message. `needs` names the
    permissions that what was asked wants. Nothing of the answer is quoted but names that are known."""
    code = ERRORS.get(error) or ("encryption" if error.startswith("KMS.") else "") or _by_status(status)
    known = error if error in ERRORS else ""
    detail = f"S3 answered {known or status}" if step != "role" else f"STS answered {known or status}"
    if code == "denied" and step == "role":
        code = "role"
    if code == "denied" or code == "role":
        named = _PERMISSION.search(message)
        missing = named[0] if named is not None else needs
        if missing.startswith("kms:"):
            code = "encryption"
        detail += f": the permission {missing} is missing"
    elif code == "wrong_region" and _REGION.fullmatch(region):
        detail += f": the bucket is in {region}"
    wait_s = min(float(retry_after), MAX_RETRY_AFTER_S) if retry_after.isascii() and retry_after.isdigit() else 0.0
    return Fault(
        code, f"{detail}. {CODES[code]}", error=known or str(status), status=status, retry_after_s=wait_s, step=step
    )


def _by_status(status: int) -> str:
    return _STATUS.get(status) or ("server_error" if status >= 500 else "protocol" if status < 400 else "refused")


def unanswered(answer: Answer, step: Step) -> Fault:
    """Of a request that got no answer. What never went out cannot have been stored."""
    code = answer.fault
    if answer.step != "answer" and code in ("timeout", "reset"):
        code = "tls" if answer.step == "tls" else "unreachable"
    if code in ("headers_too_large", "client_identity", ""):
        code = "protocol"
    if code == "protocol" and answer.step == "tls":
        code = "tls"
    return Fault(code, answer.detail, step="connect" if answer.step != "answer" else step)
