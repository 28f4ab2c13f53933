"""The device's side of the link: from released fields to a checked reply, or a failure that says what went wrong."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from cda4rec_jax.privacy.gate import Gate, GatedUplink
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.runtime.clock import LinkRealisation, RequestClock
from cda4rec_jax.runtime.wire import Codec, ErrorResponse, RetrieveResponse, decode_reply, encode_uplink

Transport = Callable[[bytes], bytes]


class BranchFailed(Exception):
    """The cloud branch gave no candidates. ``flag`` is what the trace says of it."""

    flag: str


class LinkFailed(BranchFailed):
    """Nothing came back over the link."""

    flag = "link_failed"


class CloudFailed(BranchFailed):
    """The cloud answered, but with an error or with bytes that are no reply to this request."""

    flag = "cloud_failed"


class CacheMissing(BranchFailed):
    """There is no embedding to reuse any more."""

    flag = "cache_missing"


class Late(BranchFailed):
    """The candidates came, or would come, when the device had to answer already."""

    flag = "deadline_hedged"


class TransferLog:
    """Bytes that one request has put on the link so far. Once ``abandon`` returns, the request sends nothing more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abandoned = False
        self.uplink_bytes = 0
        self.downlink_bytes = 0
        self.transfer_ms = 0.0

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True

    def send(self, payload_bytes: int, authorise: Callable[[], None]) -> None:
        """Count an uplink about to begin. Raises Late, or what ``authorise`` raises; then nothing is counted."""
        with self._lock:
            if self._abandoned:
                raise Late("the request was answered without the cloud")
            authorise()
            self.uplink_bytes += payload_bytes


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """A release and its bytes on the wire."""

    gated: GatedUplink
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A checked reply, its size, and the reading of the branch's clock when the cloud began to work on the request."""

    response: RetrieveResponse
    arrived_ms: float
    downlink_bytes: int


class DeviceClient:
    """Releases through the gate, sends, resends identical bytes, and checks what comes back. Safe to share between threads.

    Args:
        transport: carries request bytes to the cloud and returns the reply's. It raises ConnectionError or TimeoutError when it
            fails, and needs a time limit of its own: nothing here ends its wait.
        gate: the user's gate.
        attempts: sends of one release at most, where the transport fails.
        codec: of requests and replies.
    """

    def __init__(self, transport: Transport, gate: Gate, *, attempts: int = 2, codec: Codec = Codec.MSGPACK) -> None:
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}; expected at least 1")
        self._transport = transport
        self._gate = gate
        self._attempts = attempts
        self._codec = codec

    def release(self, fields: UplinkFields) -> Uplink:
        """Ask the gate. Raises EgressDenied."""
        gated = self._gate.release(fields)
        return Uplink(gated=gated, payload=encode_uplink(gated, self._codec))

    def exchange(
        self, uplink: Uplink, link: LinkRealisation, clock: RequestClock, log: TransferLog, timeout_ms: float
    ) -> Exchange:
        """Send a release and wait for the reply; the link's delays pass on ``clock``.

        Args:
            uplink: what to send.
            link: what the request meets.
            clock: of the branch.
            log: counts bytes as they leave and come.
            timeout_ms: wait for a reply where ``link`` has failed; the transport's waits are its own.

        Raises:
            EgressDenied: consent was withdrawn; nothing (more) is sent.
            LinkFailed, CloudFailed, Late: there is no answer.
        """
        payload = uplink.payload
        failure: Exception | None = None
        for _ in range(self._attempts):
            log.send(len(payload), lambda: self._gate.authorise_send(uplink.gated))
            if link.failed:
                clock.wait(lambda: timeout_ms)
                raise LinkFailed(f"nothing came back within {timeout_ms:.0f} ms")
            log.transfer_ms += clock.wait(link.transfer_ms, len(payload), "up")
            clock.wait(lambda: link.queue_ms)
            arrived_ms = clock.now_ms()
            try:
                answer = self._transport(payload)
            except (ConnectionError, TimeoutError) as error:
                failure = error
                continue
            response = self._read(answer, uplink.gated.fields.request_id)
            log.downlink_bytes += len(answer)
            log.transfer_ms += clock.wait(link.transfer_ms, len(answer), "down")
            return Exchange(response=response, arrived_ms=arrived_ms, downlink_bytes=len(answer))
        raise LinkFailed(f"the link failed {self._attempts} times: {failure}") from failure

    def _read(self, answer: bytes, request_id: str) -> RetrieveResponse:
        try:
            reply = decode_reply(answer, self._codec)
        except Exception as error:  # whatever the parser makes of it, it is no reply
            raise CloudFailed(f"{type(error).__name__}: {error}") from error
        if isinstance(reply, ErrorResponse):
            raise CloudFailed(f"{reply.code}: {reply.message}")
        if reply.request_id != request_id:
            raise CloudFailed("the reply belongs to another request")
        return reply
