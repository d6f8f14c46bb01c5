"""The kinds of destination there are. A new kind is one line here."""

from collections.abc import Mapping
from typing import Any, Final

from connectors.contract import Feed, Spec
from connectors.kafka.connector import SPEC as KAFKA
from connectors.s3.connector import SPEC as S3
from connectors.webhook.connector import SPEC as WEBHOOK

KINDS: Final[Mapping[str, Spec[Any, Any]]] = {spec.kind: spec for spec in (WEBHOOK, KAFKA, S3)}
STAGED: Final = frozenset(kind for kind, spec in KINDS.items() if spec.feed is Feed.STAGE)
LATER: Final = frozenset({"bigquery"})


class UnknownKind(ValueError):
    """No destination of this kind can be made; the message says which there are."""


def spec_of(kind: str) -> Spec[Any, Any]:
    """Raises UnknownKind."""
    spec = KINDS.get(kind)
    if spec is not None:
        return spec
    known = ", ".join(sorted(KINDS))
    if kind in LATER:
        raise UnknownKind(f"type {kind} arrives with a later release; this one has: {known}")
    raise UnknownKind(f"unknown type {kind!r}; known: {known}")
