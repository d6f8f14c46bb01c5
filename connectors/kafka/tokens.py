"""Tokens for OAUTHBEARER, by the grant `client_credentials` (RFC 6749, 4.4), through the HTTP client of the door.

A new one for each login: there are few, one a broker, and so no clock has to be compared with a token's end.
"""

import asyncio
import base64
from functools import partial
from typing import Final
from urllib.parse import quote_plus, urlencode

import msgspec
from aiokafka.abc import AbstractTokenProvider
from msgspec import Struct
from pydantic import SecretStr

from connectors.contract import give
from connectors.egress import Egress
from connectors.http.answer import MAX_ANSWER_BYTES, Answer
from connectors.http.place import Place
from connectors.kafka.classify import Fault
from schemas.ids import TenantRef


class _Granted(Struct):
    access_token: str


_decode: Final = msgspec.json.Decoder(_Granted).decode


class Tokens(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka is untyped
    def __init__(
        self,
        egress: Egress,
        tenant: TenantRef,
        place: Place,
        client: str,
        secret: SecretStr,
        scope: str,
        timeout_s: float,
    ) -> None:
        self._target = egress.http.target(tenant, place, excerpt_bytes=MAX_ANSWER_BYTES)
        self._timeout_s = timeout_s
        pair = f"{quote_plus(client)}:{quote_plus(secret.get_secret_value())}"
        credentials = base64.b64encode(pair.encode())
        form = urlencode({"grant_type": "client_credentials", **({"scope": scope} if scope else {})}).encode()
        self._message = (
            b"%bcontent-type: application/x-www-form-urlencoded\r\naccept: application/json\r\n"
            b"authorization: Basic %b\r\ncontent-length: %d\r\n\r\n%b"
        ) % (self._target.head, credentials, len(form), form)

    async def token(self) -> str:
        """Raises Fault."""
        given: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._target.post(self._message, self._timeout_s, partial(give, given))
        answer = await given
        if answer.fault == "egress_blocked":
            raise Fault("egress_blocked", answer.detail, step="login")
        if answer.status != 200:
            why = f"it answered {answer.status}" if answer.status else answer.detail or answer.fault
            raise Fault("token", f"the token service did not give a token: {why}", step="login")
        try:
            token = _decode(answer.excerpt).access_token
        except msgspec.DecodeError:
            token = ""
        # what else it holds would be read as another field of the login
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise Fault("token", "the token service's answer holds no access_token", step="login")
        return token

    async def close(self) -> None:
        await self._target.close()
