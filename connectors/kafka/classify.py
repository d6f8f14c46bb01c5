"""What a broker's answer, or the lack of one, means: verdict, fault and code, and whether the record may be there.

Every error that aiokafka knows has its place here, and so have the newer ones that a broker may answer to what this
kind asks. What only a person on the tenant's side can mend (rights, a password, a topic that is not there) is tried
again: a late grant must not kill a backlog.
"""

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from aiokafka import errors

from schemas.outcome import Fault as Whose
from schemas.outcome import Outcome, reject, retry

Step: TypeAlias = Literal["resolve", "connect", "tls", "login", "topic", "brokers", "write"]

# A metric label: closed.
CODES: Final = {
    "ok": "All in-sync replicas have the record.",
    "key": "The key's expression cannot be evaluated on this event.",
    "too_large": "The record exceeds what the topic or the broker takes.",
    "refused": "The broker refuses this record, such as one without a key in a compacted topic.",
    "denied": "The broker accepts neither the credentials nor their rights to the topic. Tried again: grant them.",
    "unknown_topic": "The topic is not there. Tried again: create it.",
    "invalid_topic": "The topic's name is not one that the cluster allows to write to.",
    "incompatible": "The cluster does not speak what is asked of it: SASL mechanism, compression or version.",
    "unavailable": "No leader, too few in-sync replicas, or a broker that is starting or has a fault of its disk.",
    "throttled": "The broker asks to come back later.",
    "sequence": "The broker has lost track of this producer, which begins anew.",
    "server_error": "Another error of the broker.",
    "protocol": "The answer is not one of Kafka, or none to what was asked.",
    "timeout": "Not stored, or not known to be, within the destination's timeout.",
    "dns": "A broker's name does not resolve.",
    "connect_refused": "Nothing listens at a broker's address and port.",
    "unreachable": "No address of a broker could be reached.",
    "reset": "The connection ended before the answer was complete.",
    "tls": "The TLS handshake failed: the certificate is invalid, expired, or for another name, or TLS is too old.",
    "client_certificate": "The client certificate and key of the destination cannot be used.",
    "token": "The token service did not give a token.",
    "egress_blocked": "A broker's address, given or advertised, is not public, or would be spoken to in clear text.",
    "no_resources": "The worker has no socket or no producer to spare. Ours to mend; costs no attempt.",
    "connector_error": "An error on our side, of which we have been told; costs no attempt.",
    "closed": "The worker closed the destination while it was stopping or reconfigured; costs no attempt.",
}

EVENT: Final = frozenset({"key", "too_large", "refused"})
_REJECTED: Final = EVENT | {"invalid_topic", "incompatible", "client_certificate", "egress_blocked"}
_OURS: Final = frozenset({"no_resources", "connector_error", "closed"})


class Fault(Exception):
    """Why something could not be done: a code of `CODES`, and more for the tenant, which quotes nothing of an answer.

    `uncertain`: the records that were asked to be stored may be. `moved`: another broker may know better, soon.
    `step`: how far it came, for `check`.
    """

    def __init__(
        self, code: str, detail: str = "", *, uncertain: bool = False, moved: bool = False, step: Step = "connect"
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail or CODES[code]
        self.uncertain = uncertain
        self.moved = moved
        self.step: Step = step

    @property
    def outcome(self) -> Outcome:
        whose: Whose = "event" if self.code in EVENT else "platform" if self.code in _OURS else "destination"
        return (reject if self.code in _REJECTED else retry)(whose, self.code, self.detail)


# The errors of a broker, and of aiokafka's own, by what they mean when they come of a connection, a login, or a produce
# request. Those that belong to other requests (groups, transactions, administration) are no answer to what is asked.
ERRORS: Final[Mapping[type[Exception], str]] = {
    errors.MessageSizeTooLargeError: "too_large",
    errors.RecordListTooLargeError: "too_large",
    errors.RecordTooLargeError: "too_large",
    errors.InvalidTimestampError: "refused",
    errors.PolicyViolationError: "refused",
    errors.TopicAuthorizationFailedError: "denied",
    errors.ClusterAuthorizationFailedError: "denied",
    errors.TransactionalIdAuthorizationFailed: "denied",
    errors.DelegationTokenAuthorizationFailed: "denied",
    errors.DelegationTokenExpired: "denied",
    errors.DelegationTokenNotFound: "denied",
    errors.DelegationTokenAuthDisabled: "denied",
    errors.DelegationTokenOwnerMismatch: "denied",
    errors.DelegationTokenRequestNotAllowed: "denied",
    errors.SaslAuthenticationFailed: "denied",
    errors.AuthenticationFailedError: "denied",
    errors.InvalidPrincipalType: "denied",
    errors.UnknownTopicOrPartitionError: "unknown_topic",
    errors.InvalidTopicError: "invalid_topic",
    errors.UnsupportedSaslMechanismError: "incompatible",
    errors.IllegalSaslStateError: "incompatible",
    errors.AuthenticationMethodNotSupported: "incompatible",
    errors.SecurityDisabled: "incompatible",
    errors.UnsupportedVersionError: "incompatible",
    errors.UnsupportedForMessageFormatError: "incompatible",
    errors.UnsupportedCodecError: "incompatible",
    errors.IncompatibleBrokerVersion: "incompatible",
    errors.UnrecognizedBrokerVersion: "incompatible",
    errors.LeaderNotAvailableError: "unavailable",
    errors.NotLeaderForPartitionError: "unavailable",
    errors.ReplicaNotAvailableError: "unavailable",
    errors.BrokerNotAvailableError: "unavailable",
    errors.NotEnoughReplicasError: "unavailable",
    errors.NotEnoughReplicasAfterAppendError: "unavailable",
    errors.KafkaStorageError: "unavailable",
    errors.LogDirNotFound: "unavailable",
    errors.ListenerNotFound: "unavailable",
    errors.ReassignmentInProgress: "unavailable",
    errors.GroupLoadInProgressError: "unavailable",
    errors.GroupCoordinatorNotAvailableError: "unavailable",
    errors.NotCoordinatorForGroupError: "unavailable",
    errors.NoBrokersAvailable: "unavailable",
    errors.NodeNotReadyError: "unavailable",
    errors.StaleMetadata: "unavailable",
    errors.MetadataEmptyBrokerList: "unavailable",
    errors.KafkaUnavailableError: "unavailable",
    errors.TooManyInFlightRequests: "unavailable",
    errors.QuotaViolationError: "throttled",
    errors.OutOfOrderSequenceNumber: "sequence",
    errors.DuplicateSequenceNumber: "sequence",
    errors.UnknownProducerId: "sequence",
    errors.InvalidProducerEpoch: "sequence",
    errors.InvalidProducerIdMapping: "sequence",
    errors.ProducerFenced: "sequence",
    errors.UnknownError: "server_error",
    errors.CorruptRecordException: "server_error",
    errors.KafkaError: "server_error",
    errors.BrokerResponseError: "server_error",
    errors.RequestTimedOutError: "timeout",
    errors.KafkaTimeoutError: "timeout",
    errors.KafkaConnectionError: "reset",
    errors.Cancelled: "closed",
    errors.ProducerClosed: "closed",
    errors.ConsumerStoppedError: "closed",
    # no answers to what is asked
    errors.NoError: "protocol",
    errors.KafkaProtocolError: "protocol",
    errors.CorrelationIdError: "protocol",
    errors.OffsetOutOfRangeError: "protocol",
    errors.InvalidFetchRequestError: "protocol",
    errors.StaleControllerEpochError: "protocol",
    errors.OffsetMetadataTooLargeError: "protocol",
    errors.StaleLeaderEpochCodeError: "protocol",
    errors.InvalidRequiredAcksError: "protocol",
    errors.IllegalGenerationError: "protocol",
    errors.InconsistentGroupProtocolError: "protocol",
    errors.InvalidGroupIdError: "protocol",
    errors.UnknownMemberIdError: "protocol",
    errors.InvalidSessionTimeoutError: "protocol",
    errors.RebalanceInProgressError: "protocol",
    errors.InvalidCommitOffsetSizeError: "protocol",
    errors.GroupAuthorizationFailedError: "protocol",
    errors.TopicAlreadyExistsError: "protocol",
    errors.InvalidPartitionsError: "protocol",
    errors.InvalidReplicationFactorError: "protocol",
    errors.InvalidReplicationAssignmentError: "protocol",
    errors.InvalidConfigurationError: "protocol",
    errors.NotControllerError: "protocol",
    errors.InvalidRequestError: "protocol",
    errors.InvalidTxnState: "protocol",
    errors.InvalidTransactionTimeout: "protocol",
    errors.ConcurrentTransactions: "protocol",
    errors.TransactionCoordinatorFenced: "protocol",
    errors.OperationNotAttempted: "protocol",
    errors.NonEmptyGroup: "protocol",
    errors.GroupIdNotFound: "protocol",
    errors.FetchSessionIdNotFound: "protocol",
    errors.InvalidFetchSessionEpoch: "protocol",
    errors.MemberIdRequired: "protocol",
    errors.CommitFailedError: "protocol",
    errors.NoOffsetForPartitionError: "protocol",
    errors.IllegalStateError: "protocol",
    errors.IllegalArgumentError: "protocol",
    errors.IllegalOperation: "protocol",
    errors.KafkaConfigurationError: "protocol",
}

INVALID_RECORD: Final = 87
CORRUPT: Final = errors.CorruptRecordException.errno
DUPLICATE: Final = errors.DuplicateSequenceNumber.errno
LOADING: Final = errors.GroupLoadInProgressError.errno
# What brokers answer to a produce request that aiokafka has no class for, by number and name.
NEWER: Final[Mapping[int, tuple[str, str]]] = {
    74: ("FENCED_LEADER_EPOCH", "unavailable"),
    75: ("UNKNOWN_LEADER_EPOCH", "unavailable"),
    76: ("UNSUPPORTED_COMPRESSION_TYPE", "incompatible"),
    INVALID_RECORD: ("INVALID_RECORD", "refused"),
    89: ("THROTTLING_QUOTA_EXCEEDED", "throttled"),
    90: ("PRODUCER_FENCED", "sequence"),
}

_MOVED: Final = frozenset({5, 6, 9, 74, 75})
# the broker's own wait for its replicas ended, or fewer than it needs have the record: the leader has it
_MAYBE_STORED: Final = frozenset({7, 20})


def fault_of(number: int, step: Step = "write") -> Fault:
    """Of an error number that a broker answered."""
    known = NEWER.get(number)
    if known is None:
        found = errors.for_code(number)
        known = found.message, ERRORS[found]
    name, code = known
    return Fault(
        code,
        f"the broker answered {name} ({number})",
        uncertain=number in _MAYBE_STORED,
        moved=number in _MOVED,
        step=step,
    )


def raised(fault: Exception, step: Step) -> Fault:
    """Of what aiokafka raised at a connection or a login."""
    if isinstance(fault, errors.BrokerResponseError) and type(fault) is not errors.BrokerResponseError:
        return fault_of(fault.errno, step)
    return Fault(next((ERRORS[found] for found in type(fault).__mro__ if found in ERRORS), "protocol"), step=step)
