"""One HTTP request and its answer, sent again where that may help."""

import asyncio
import email.utils
import logging
import random
import time
from dataclasses import dataclass

import httpx

from bge_rerank_adapters.errors import RemoteError, RerankError
from bge_rerank_adapters.remote.refusals import Answer, refusal
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import Tally

__all__ = ["Answer", "Exchange"]

_AGAIN = frozenset({429, 503})
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0
# Longer than this nobody waits because a server says so: the caller decides.
_LONGEST_RETRY_AFTER_S = 30.0
# Of an answer that is an error: enough for its message.
_ERROR_BYTES = 1 << 16
# Nothing of the request has reached the server.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
# The connection broke, before the answer or within it.
_BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Again:
    """Why a request is to be sent again, and the error if it is not.

    Attributes:
        why: What the log says.
        error: What the caller gets in the end.
        cause: Of the error.
        wait_s: Seconds that the server asks to wait.
        once: Whether to send it again once only.
    """

    why: str
    error: RerankError
    cause: Exception | None = None
    wait_s: float | None = None
    once: bool = False

    def final_error(self, tries: int) -> RerankError:
        """Return the error, with how often the request was sent."""
        asked = "" if self.wait_s is None else f"; the server asks to wait {self.wait_s:.0f} s"
        self.error.args = (f"{self.error} (Sent {tries} times{asked}.)",)
        return self.error


class Exchange:
    """Sends requests, and again on 429, 503, and where the server cannot be reached.

    Scoring changes nothing on a server, so a request whose connection broke is sent again too,
    though once only: usually the server had closed an idle connection, but a request that makes
    servers die should not go round all of them. The same holds for a 500 that is no JSON: a proxy
    answers so where the server behind it died. A server whose model failed says so in JSON.
    """

    def __init__(self, client: httpx.AsyncClient, settings: RemoteSettings, tally: Tally) -> None:
        self._client, self._settings, self._tally = client, settings, tally

    async def get(self, url: str, *, deadline: float | None, longest: int) -> Answer:
        """Return the answer to a GET; otherwise as `post`."""
        return await self._send("GET", url, None, deadline=deadline, longest=longest)

    async def post(self, url: str, body: bytes, *, deadline: float | None, longest: int) -> Answer:
        """Return the answer to a POST of JSON, unless its status says to send it again.

        Args:
            url: Where to.
            body: JSON.
            deadline: When the caller gives up, by `time.monotonic`; no wait begins that would go
                past it.
            longest: Most bytes of an answer.

        Raises:
            Overloaded: It was 429 to the end.
            RemoteError: It was 503 to the end or a proxy's 500 twice, the server cannot be
                reached, or the answer was cut off or is too long.
        """
        return await self._send("POST", url, body, deadline=deadline, longest=longest)

    async def _send(
        self, method: str, url: str, body: bytes | None, *, deadline: float | None, longest: int
    ) -> Answer:
        tries, sent_again = 0, False
        while True:
            tries += 1
            self._tally.add(http_requests=1)
            again = await self._try(method, url, body, longest)
            if isinstance(again, Answer):
                return again
            if again.once and sent_again:
                raise again.final_error(tries) from again.cause
            sent_again |= again.once
            wait_s = _wait_s(tries, again.wait_s)
            if tries > self._settings.max_retries or _too_long(wait_s, again.wait_s, deadline):
                raise again.final_error(tries) from again.cause
            _log.info("%s %s; sending again in %.2f s", url, again.why, wait_s)
            self._tally.add(retries=1)
            await asyncio.sleep(wait_s)

    async def _try(
        self, method: str, url: str, body: bytes | None, longest: int
    ) -> "Answer | _Again":
        try:
            answer = await self._once(method, url, body, longest)
        except _NOT_SENT as error:
            why = f"cannot be reached ({_named(error)})"
            message = f"{url} {why}; is the server running, and the address right?"
            return _Again(why, RemoteError(message), error)
        except _BROKEN as error:
            why = f"broke the connection off ({_named(error)})"
            message = f"{url} {why}; its log may say why."
            return _Again(why, RemoteError(message), error, once=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"The request to {url} failed ({_named(error)}).") from error
        by_proxy = answer.status == 500 and not answer.is_json
        if answer.status not in _AGAIN and not by_proxy:
            return answer
        return _Again(
            f"answered {answer.status}",
            refusal(answer, url, self._settings),
            wait_s=answer.retry_after_s,
            once=by_proxy,
        )

    async def _once(self, method: str, url: str, body: bytes | None, longest: int) -> Answer:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        async with self._client.stream(method, url, content=body, headers=headers) as response:
            success = response.status_code == 200
            chunks: list[bytes] = []
            size = 0
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                chunks.append(chunk)
                if success and size > longest:
                    raise RemoteError(
                        f"{url} answered with more than {longest} bytes, far more than scores "
                        "take; is it the address of a rerank server?"
                    )
                if not success and size > _ERROR_BYTES:
                    break
            return Answer(
                response.status_code,
                b"".join(chunks),
                _retry_after_s(response.headers.get("Retry-After")),
                response.headers.get("Location"),
            )


def _wait_s(tries: int, asked_s: float | None) -> float:
    """Return how long to wait: longer each time, and not the same for all who were refused."""
    if asked_s is not None:
        return asked_s * random.uniform(1.0, 1.1)  # noqa: S311 - no secret depends on it
    longest = min(_FIRST_WAIT_S * 2.0 ** min(tries - 1, 10), _LONGEST_WAIT_S)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311


def _too_long(wait_s: float, asked_s: float | None, deadline: float | None) -> bool:
    if asked_s is not None and asked_s > _LONGEST_RETRY_AFTER_S:
        return True
    return deadline is not None and time.monotonic() + wait_s >= deadline


def _retry_after_s(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which may also be a date; `None` for neither."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
