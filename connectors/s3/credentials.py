"""Whose rights a destination's requests have: those of its access key, or of the role that it assumes with it."""

import asyncio
from typing import Final, Protocol

from connectors.s3.classify import Fault
from connectors.s3.client import Credentials, Service

SESSION_S: Final = 3600
# A session is renewed when this much of it is left: the requests of a whole batch must end before it does.
RENEW_S: Final = 600


class Holder(Protocol):
    async def current(self) -> Credentials:
        """Raises Fault."""
        ...

    def refused(self, fault: Fault) -> None:
        """What S3 said to the last ones."""
        ...


class AccessKey:
    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def current(self) -> Credentials:
        return self._credentials

    def refused(self, fault: Fault) -> None:
        """There are no others."""


class Role:
    """Assumes a role, and again before the session ends. Asked by many at once, it asks once."""

    def __init__(self, sts: Service, base: Credentials, role: str, external_id: str, session_name: str) -> None:
        self._sts = sts
        self._base = base
        self._asked = {
            "RoleArn": role,
            "RoleSessionName": session_name,
            "DurationSeconds": SESSION_S,
            **({"ExternalId": external_id} if external_id else {}),
        }
        self._lock = asyncio.Lock()
        self._credentials: Credentials | None = None
        # of the loop's clock, so that no wall clock has to agree with that of STS
        self._ends_s = 0.0

    async def current(self) -> Credentials:
        now = asyncio.get_running_loop().time
        async with self._lock:
            if self._credentials is not None and now() < self._ends_s - RENEW_S:
                return self._credentials
            asked_s = now()
            try:
                answer = await self._sts.ask(self._base, "assume_role", "role", "sts:AssumeRole", **self._asked)
                given = answer["Credentials"]
                self._credentials = Credentials(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"])
            except KeyError:
                raise Fault("protocol", "the answer to AssumeRole holds no credentials", step="role") from None
            except Fault:
                if self._credentials is None or now() >= self._ends_s:
                    raise
                return self._credentials  # what is left of them: the next batch asks again
            self._ends_s = asked_s + SESSION_S
            return self._credentials

    def refused(self, fault: Fault) -> None:
        if fault.code in ("expired_token", "credentials"):
            self._credentials = None
