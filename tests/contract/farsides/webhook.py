"""A webhook receiver on loopback that misbehaves on demand. The `standardwebhooks` package checks its signatures."""

import base64
import json
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from standardwebhooks.webhooks import Webhook

from schemas.ids import DeliveryId
from schemas.outcome import Verdict
from tests.connectors.receiver import OK, Peer, Receiver
from tests.contract.far_side import CANARY, Held, Mode

TOKEN = f"Bearer {CANARY}-token"
SIGNING = "whsec_" + base64.b64encode(f"{CANARY}-signing-secret-of-a-test".encode()).decode()

_STATUS = {
    Mode.THROTTLED: b"429 Too Many Requests\r\nretry-after: 7",
    Mode.DENIED: b"401 Unauthorized",
    Mode.GONE: b"410 Gone",
    Mode.REFUSES: b"422 Unprocessable Content",
}


class WebhookFarSide:
    allow = (ip_network("127.0.0.0/8"),)
    retry_after_s = 7.0
    differs: Mapping[Mode, Verdict | None] = {}

    def __init__(self) -> None:
        self._mode = Mode.UP
        self._held: list[Held] = []
        self._touched = 0
        self._receiver: Receiver | None = None
        self._port = 0

    async def start(self) -> None:
        self._receiver = Receiver(self._script, port=self._port)
        await self._receiver.__aenter__()
        self._port = self._receiver.port

    async def stop(self) -> None:
        if self._receiver is not None:
            await self._receiver.__aexit__(None, None, None)
            self._receiver = None

    async def become(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.DOWN:
            await self.stop()
        elif self._receiver is None:
            await self.start()

    def options(self) -> Mapping[str, Any]:
        return {"url": f"http://127.0.0.1:{self._port}/hooks?token={CANARY}", "timeout": "500ms"}

    def secrets(self) -> Mapping[str, Any]:
        return {"signing": SIGNING, "headers": {"Authorization": TOKEN}}

    def held(self) -> Sequence[Held]:
        return self._held

    def touched(self) -> int:
        return self._touched

    async def _script(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            self._touched += 1
            match self._mode:
                case Mode.UP | Mode.DOWN:
                    assert request.headers["authorization"] == TOKEN
                    delivery = DeliveryId(request.headers["webhook-id"])
                    body = Webhook(SIGNING).verify(request.body, request.headers)
                    self._held.append(Held(delivery, json.dumps(body["payload"], separators=(",", ":")).encode()))
                    await peer.send(OK)
                case Mode.RESETS:
                    peer.reset()
                    return
                case Mode.HANGS:
                    await peer.gone()
                    return
                case Mode.GARBLED:
                    await peer.send(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
                    return
                case mode:
                    await peer.send(b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % _STATUS[mode])


FAR_SIDE = WebhookFarSide
