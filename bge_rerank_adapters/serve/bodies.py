"""Bodies of requests: read within limits, and parsed as strictly as JSON is defined."""

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from bge_rerank_adapters.serve.refusals import CLIENT_GONE, Refusal
from bge_rerank_adapters.serve.settings import ServerSettings

# From here on a body is parsed in a thread, where Python's lock is passed on in between.
_LARGE_BODY_BYTES = 64 * 1024
_LISTS = ("documents", "texts")
# What is looked at name by name, on the event loop, must not be a million of them.
_MOST_NAMES = 100
# A string, or the rest of the body where it does not end. Possessive, so that it takes one pass.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# Lists and objects of a request that are no documents.
_OTHER_PARTS = 20


class JsonRequest(Request):
    """A request whose body must be a JSON object of limited size."""

    @property
    def _limits(self) -> ServerSettings:
        settings: ServerSettings = self.app.state.settings
        return settings

    async def body(self) -> bytes:
        """Return the body.

        Raises:
            Refusal: It is not declared to be JSON, too large, or too slow.
        """
        if not hasattr(self, "_body"):
            self._check_content_type()
            self._check_declared_size()
            self._body = await self._read()
        return self._body

    async def json(self) -> Any:
        """Return the body's object.

        Raises:
            Refusal: It is none, or has too many documents.
        """
        if not hasattr(self, "_json"):
            body = await self.body()
            most = self._limits.max_documents
            large = len(body) > _LARGE_BODY_BYTES
            parsed = await asyncio.to_thread(_parse_large, body, most) if large else _parse(body)
            # Before anything looks at the items, of which there may be many.
            _check_lists(parsed, most)
            self._json = parsed
        return self._json

    def _check_content_type(self) -> None:
        declared = self.headers.get("content-type", "")
        kind = declared.partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(
                415, f"The body must be sent with Content-Type: application/json, got {kind!r}."
            )
        if self.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refusal(415, "A compressed body is not read here; send it as it is.")

    def _check_declared_size(self) -> None:
        declared = self.headers.get("content-length", "")
        # int() would read other alphabets' digits too, and refuse thousands of them slowly.
        if declared.isascii() and declared.isdigit() and len(declared) < 20:
            self._check_size(int(declared))
        elif declared:
            raise Refusal(400, "Content-Length must be a number of bytes.")

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            raise Refusal(
                413,
                f"The body is larger than the {self._limits.max_body_bytes} bytes that this "
                "server reads; send fewer or shorter documents at a time.",
            )

    async def _read(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for chunk in self.stream():
                    size += len(chunk)
                    self._check_size(size)
                    chunks.append(chunk)
        except TimeoutError as error:
            raise Refusal(
                408,
                f"The body did not arrive within {self._limits.body_timeout_s} seconds.",
                headers={"Connection": "close"},
            ) from error
        except ClientDisconnect as error:
            raise Refusal(CLIENT_GONE, "The client has gone.") from error
        return b"".join(chunks)


class JsonRoute(APIRoute):
    """A route whose handler gets a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, given such a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def _parse_large(body: bytes, most: int) -> dict[str, Any]:
    _check_parts(body, most)
    return _parse(body)


def _check_parts(body: bytes, most: int) -> None:
    """Refuse a body of far more parts than a request has.

    A few megabytes of empty lists take Python's parser and garbage collector a second, in which
    nothing else runs, threads or not.

    Raises:
        Refusal: It has them.
    """
    if _fits(body.count(b"[") + body.count(b"{"), body.count(b","), most):
        return
    # Most are in texts, then. A loop of Python's own lets other threads have their turn.
    parts = commas = end = 0
    for string in itertools.chain(_STRING.finditer(body), (None,)):
        start = len(body) if string is None else string.start()
        parts += body.count(b"[", end, start) + body.count(b"{", end, start)
        commas += body.count(b",", end, start)
        if not _fits(parts, commas, most):
            raise Refusal(
                413,
                f"The body has far more parts than a request of {most} documents, which is the "
                "most that this server takes at a time; send them in parts.",
            )
        end = start if string is None else string.end()


def _fits(parts: int, commas: int, most: int) -> bool:
    return parts <= most + _OTHER_PARTS and commas <= (most + _OTHER_PARTS) * _MOST_NAMES


class _NotReadError(ValueError):
    """JSON of a kind that Python's parser takes and this server does not."""


def _parse(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(
            body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise Refusal(400, "The body is nested too deeply.") from error
    except UnicodeDecodeError as error:
        raise Refusal(400, f"The body must be in UTF-8; byte {error.start} is not.") from error
    except json.JSONDecodeError as error:
        raise Refusal(400, f"The body is no JSON: {error.msg} at {error.pos}.") from error
    except _NotReadError as error:
        raise Refusal(400, f"The body is not read: {error}.") from error
    except ValueError as error:
        raise Refusal(400, "The body has a number of too many digits.") from error
    if not isinstance(parsed, dict):
        raise Refusal(422, "The body must be a JSON object.")
    return parsed


def _no_constant(name: str) -> Any:
    raise _NotReadError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_NAMES:
        raise _NotReadError(f"an object has more than {_MOST_NAMES} names")
    made = dict(pairs)
    # Of two values for a name a proxy may check one, and we would take the other.
    if len(made) != len(pairs):
        raise _NotReadError("a name is there twice in one object")
    return made


def _check_lists(parsed: dict[str, Any], most: int) -> None:
    fields = parsed.get("rank_fields")
    if isinstance(fields, list) and len(fields) > _MOST_NAMES:
        raise Refusal(422, f"rank_fields must name at most {_MOST_NAMES} fields.")
    for name in _LISTS:
        items = parsed.get(name)
        if isinstance(items, list) and len(items) > most:
            raise Refusal(
                413,
                f"There are {len(items)} {name}, and this server takes at most {most} at a time; "
                "send them in parts.",
            )
