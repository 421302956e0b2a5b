"""Sends HTTP requests, with retries."""

import asyncio
import email.utils
import logging
import math
import random
import time
from dataclasses import dataclass

import httpx

from bge_rerank_adapters.calls.counters import Counters
from bge_rerank_adapters.errors import RemoteError, RerankError
from bge_rerank_adapters.remote.refusals import Answer, refusal
from bge_rerank_adapters.remote.settings import RemoteSettings

# A proxy answers 502 while the server behind it starts.
_RETRIED = frozenset({429, 502, 503})
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0
# No retry if less than this is left until the deadline.
_SHORTEST_WAIT_S = 0.05
# Maximum Retry-After that is obeyed without a deadline; a longer wait is for the caller to decide.
_LONGEST_RETRY_AFTER_S = 30.0
# Maximum retries after broken connections; a server may restart more than once during a request.
_MAX_BREAKS = 3
# Number of failures in a row after which a warning is logged.
_WARN_AFTER = 3
# Limit on the size of an error's body: enough for its message.
_ERROR_BYTES = 1 << 16
# The request did not reach the server.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
# The connection broke before or during the answer.
_BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A failure after which a request may be sent again.

    Attributes:
        why: The reason, for the log.
        error: The error if the request is not sent again.
        wait_s: Seconds to wait, if the server states them.
        max_retries: Maximum number of retries after such failures; `None` is no limit of its own.
    """

    why: str
    error: RerankError
    wait_s: float | None = None
    max_retries: int | None = None

    def final_error(self, tries: int) -> RerankError:
        """Return the error, with the number of times that the request was sent."""
        asked = "" if self.wait_s is None else f"; the server asks to wait {self.wait_s:.0f} s"
        self.error.args = (f"{self.error} (Sent {tries} times{asked}.)",)
        return self.error


class RetryingClient:
    """Sends requests, with retries on 429, 502, 503, and if the server cannot be reached.

    It retries until the deadline or `max_retries`, so no request is lost if the server returns in
    time. Scoring has no side effects, so a request is also repeated after its connection broke, but
    three times at most, since the request itself may crash the server. A 500 without JSON is
    retried once: a proxy sends it if the server behind it died. A server whose model failed
    answers in JSON.
    """

    def __init__(
        self, client: httpx.AsyncClient, settings: RemoteSettings, tally: Counters
    ) -> None:
        self._client, self._settings, self._tally = client, settings, tally
        self._warned = False

    async def get(self, url: str, *, deadline: float | None, max_bytes: int) -> Answer:
        """Return the answer to a GET; see `post`."""
        return await self._send("GET", url, None, deadline=deadline, max_bytes=max_bytes)

    async def post(
        self, url: str, body: bytes, *, deadline: float | None, max_bytes: int
    ) -> Answer:
        """Return the answer to a POST of JSON.

        Args:
            url: The address.
            body: JSON.
            deadline: When the caller stops waiting, by `time.monotonic`. The last waits before it
                are shorter, so that the last try is close to it.
            max_bytes: Maximum size of an answer in bytes.

        Raises:
            Overloaded: The server answered 429 until the end.
            RemoteError: It answered 502 or 503 until the end or a proxy's 500 twice, it cannot be
                reached, or the answer was cut off or is too long.
        """
        return await self._send("POST", url, body, deadline=deadline, max_bytes=max_bytes)

    async def _send(
        self, method: str, url: str, body: bytes | None, *, deadline: float | None, max_bytes: int
    ) -> Answer:
        tries, limited = 0, 0
        while True:
            tries += 1
            self._tally.add(http_requests=1)
            outcome = await self._try(method, url, body, max_bytes)
            if isinstance(outcome, Answer):
                self._warned = False
                return outcome
            limited += outcome.max_retries is not None
            wait_s = _wait_s(tries, outcome.wait_s, deadline)
            if wait_s is None or self._is_last(tries, limited, outcome.max_retries):
                raise outcome.final_error(tries)
            self._log_retry(url, outcome.why, wait_s, tries=tries)
            self._tally.add(retries=1)
            await asyncio.sleep(wait_s)

    def _is_last(self, tries: int, limited: int, max_retries: int | None) -> bool:
        """Return whether a request is not sent again.

        Args:
            tries: How many times it was sent.
            limited: How many of its failures allow only some retries.
            max_retries: How many its last failure allows; `None` is any number.
        """
        allowed = self._settings.max_retries
        return (allowed is not None and tries > allowed) or (
            max_retries is not None and limited > max_retries
        )

    def _log_retry(self, url: str, why: str, wait_s: float, *, tries: int) -> None:
        """Log a retry; warn once if the server has been away for some time."""
        _log.info("%s %s; sending again in %.2f s", url, why, wait_s)
        if tries >= _WARN_AFTER and not self._warned:
            self._warned = True
            limit = self._settings.timeout_s
            until = "" if limit is None else f" until timeout_s={limit:g} is over"
            _log.warning("%s %s, %d times in a row; sending again%s", url, why, tries, until)

    async def _try(
        self, method: str, url: str, body: bytes | None, max_bytes: int
    ) -> "Answer | _Failure":
        try:
            answer = await self._once(method, url, body, max_bytes)
        except _NOT_SENT as error:
            why = f"cannot be reached ({_named(error)})"
            message = f"{url} {why}; is the server running, and the address right?"
            return _Failure(why, RemoteError(message, cause=error))
        except _BROKEN as error:
            why = f"broke the connection off ({_named(error)})"
            message = f"{url} {why}; its log may say why."
            return _Failure(why, RemoteError(message, cause=error), max_retries=_MAX_BREAKS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"The request to {url} failed ({_named(error)})."
            raise RemoteError(message, cause=error) from None
        by_proxy = answer.status == 500 and not answer.is_json
        if answer.status not in _RETRIED and not by_proxy:
            return answer
        return _Failure(
            f"answered {answer.status}",
            refusal(answer, url, self._settings),
            wait_s=answer.retry_after_s,
            max_retries=1 if by_proxy else None,
        )

    async def _once(self, method: str, url: str, body: bytes | None, max_bytes: int) -> Answer:
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
                if success and size > max_bytes:
                    raise RemoteError(
                        f"{url} answered with more than {max_bytes} bytes, far more than scores "
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
    """Return the seconds to wait, or `None` if there is no time for another try.

    Exponential backoff with jitter: at most half of the time until the deadline, and at least what
    the server states.
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
    """Return the seconds of a Retry-After header, which may be a date; `None` if it is neither."""
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
