"""One HTTP request and its answer, sent again where that may help."""

import asyncio
import email.utils
import logging
import math
import random
import time
from dataclasses import dataclass

import httpx

from bge_rerank_adapters.errors import RemoteError, RerankError
from bge_rerank_adapters.remote.refusals import Answer, refusal
from bge_rerank_adapters.remote.settings import RemoteSettings
from bge_rerank_adapters.remote.stats import Tally

__all__ = ["Answer", "Exchange"]

# A proxy answers 502 while the server behind it starts.
_AGAIN = frozenset({429, 502, 503})
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0
# Less than this before the deadline nothing is sent again.
_SHORTEST_WAIT_S = 0.05
# Longer than this nobody without a deadline waits because a server says so: the caller decides.
_LONGEST_RETRY_AFTER_S = 30.0
# A server may be restarted more than once while a request is under way.
_MOST_BREAKS = 3
# As many failures in a row are worth a warning.
_WORTH_A_WARNING = 3
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
        most: How often to send it again at most, for such reasons; `None` is as often as allowed.
    """

    why: str
    error: RerankError
    cause: Exception | None = None
    wait_s: float | None = None
    most: int | None = None

    def final_error(self, tries: int) -> RerankError:
        """Return the error, with how often the request was sent."""
        asked = "" if self.wait_s is None else f"; the server asks to wait {self.wait_s:.0f} s"
        self.error.args = (f"{self.error} (Sent {tries} times{asked}.)",)
        return self.error


class Exchange:
    """Sends requests, and again on 429, 502, 503, and where the server cannot be reached.

    It does so until the deadline, unless `max_retries` says less, so that a server that comes back
    in time loses no request. Scoring changes nothing on a server, so a request whose connection
    broke is sent again too, but three times at most: a request that makes servers die should not
    go round for ever. A 500 that is no JSON is sent again once: a proxy answers so where the server
    behind it died. A server whose model failed says so in JSON.
    """

    def __init__(self, client: httpx.AsyncClient, settings: RemoteSettings, tally: Tally) -> None:
        self._client, self._settings, self._tally = client, settings, tally
        self._warned = False

    async def get(self, url: str, *, deadline: float | None, longest: int) -> Answer:
        """Return the answer to a GET; otherwise as `post`."""
        return await self._send("GET", url, None, deadline=deadline, longest=longest)

    async def post(self, url: str, body: bytes, *, deadline: float | None, longest: int) -> Answer:
        """Return the answer to a POST of JSON, unless its status says to send it again.

        Args:
            url: Where to.
            body: JSON.
            deadline: When the caller gives up, by `time.monotonic`; no wait goes past it, and the
                last ones are shorter, so that the server is asked until then.
            longest: Most bytes of an answer.

        Raises:
            Overloaded: It was 429 to the end.
            RemoteError: It was 502 or 503 to the end or a proxy's 500 twice, the server cannot be
                reached, or the answer was cut off or is too long.
        """
        return await self._send("POST", url, body, deadline=deadline, longest=longest)

    async def _send(
        self, method: str, url: str, body: bytes | None, *, deadline: float | None, longest: int
    ) -> Answer:
        tries, suspect = 0, 0
        while True:
            tries += 1
            self._tally.add(http_requests=1)
            again = await self._try(method, url, body, longest)
            if isinstance(again, Answer):
                self._warned = False
                return again
            suspect += again.most is not None
            wait_s = _wait_s(tries, again.wait_s, deadline)
            if wait_s is None or self._is_enough(tries, suspect, again.most):
                raise again.final_error(tries) from again.cause
            self._tell(url, again.why, wait_s, tries=tries)
            self._tally.add(retries=1)
            await asyncio.sleep(wait_s)

    def _is_enough(self, tries: int, suspect: int, most: int | None) -> bool:
        allowed = self._settings.max_retries
        return (allowed is not None and tries > allowed) or (most is not None and suspect > most)

    def _tell(self, url: str, why: str, wait_s: float, *, tries: int) -> None:
        """Log a retry; who waits for a server that is away learns it, once for all requests."""
        _log.info("%s %s; sending again in %.2f s", url, why, wait_s)
        if tries >= _WORTH_A_WARNING and not self._warned:
            self._warned = True
            limit = self._settings.timeout_s
            until = "" if limit is None else f" until timeout_s={limit:g} is over"
            _log.warning("%s %s, %d times in a row; asking again%s", url, why, tries, until)

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
            return _Again(why, RemoteError(message), error, most=_MOST_BREAKS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"The request to {url} failed ({_named(error)}).") from error
        by_proxy = answer.status == 500 and not answer.is_json
        if answer.status not in _AGAIN and not by_proxy:
            return answer
        return _Again(
            f"answered {answer.status}",
            refusal(answer, url, self._settings),
            wait_s=answer.retry_after_s,
            most=1 if by_proxy else None,
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


def _wait_s(tries: int, asked_s: float | None, deadline: float | None) -> float | None:
    """Return how long to wait, or `None` where there is no time for it.

    Longer each time, and not the same for all who were refused; but at most half of what is left
    until the deadline, and never less than the server asks for.
    """
    left_s = math.inf if deadline is None else deadline - time.monotonic()
    longest_s = min(_FIRST_WAIT_S * 2.0 ** min(tries - 1, 10), _LONGEST_WAIT_S)
    wait_s = min(longest_s * random.uniform(0.5, 1.0), left_s / 2)  # noqa: S311 - no secret
    if asked_s is None:
        return wait_s if wait_s >= _SHORTEST_WAIT_S else None
    allowed_s = _LONGEST_RETRY_AFTER_S if deadline is None else left_s
    wait_s = max(wait_s, asked_s * random.uniform(1.0, 1.1))  # noqa: S311
    return wait_s if asked_s <= allowed_s and _SHORTEST_WAIT_S <= wait_s < left_s else None


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
