"""Bodies of requests: read within limits, and parsed as strictly as JSON is defined.

A body is taken for JSON whatever its Content-Type says, and if there is none: clients differ.
"""

import asyncio
import itertools
import json
import re
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from bge_rerank_adapters.serve.places import PLACE, Arriving, Body, Place
from bge_rerank_adapters.serve.refusals import CLIENT_GONE, RETRY, Refusal
from bge_rerank_adapters.serve.settings import ServerSettings

# From here on a body is parsed in a thread, where Python's lock is passed on in between.
_LARGE_BODY_BYTES = 64 * 1024
_LISTS = ("documents", "texts")
# What is looked at name by name, on the event loop, must not be a million of them.
_MOST_NAMES = 100
# A string, or the rest of the body where it does not end. Possessive, so that it takes one pass.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# Lists and objects of a request that are no documents, and how many each document may have.
_OTHER_PARTS = 20
_PARTS_PER_DOCUMENT = 20
# Of zlib: gzip's header and sum around the data.
_GZIP = 16 + zlib.MAX_WBITS


class JsonRequest(Request):
    """A request whose body must be a JSON object of limited size."""

    @property
    def _limits(self) -> ServerSettings:
        settings: ServerSettings = self.app.state.settings
        return settings

    async def body(self) -> bytes:
        """Return the body.

        Raises:
            Refusal: It is too large, too slow, or compressed in a way that is not read.
        """
        if not hasattr(self, "_body"):
            encoding = self._encoding()
            self._check_declared_size()
            body = await self._read()
            if encoding == "gzip":
                most = self._limits.max_body_bytes
                body = await asyncio.to_thread(_unpacked, body, most)
            self._body = body
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

    def _encoding(self) -> str:
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        encoding = {"x-gzip": "gzip", "": "identity"}.get(encoding, encoding)
        if encoding not in ("gzip", "identity"):
            raise Refusal(
                415,
                f"A body of Content-Encoding {encoding[:50]!r} is not read; send gzip, or none.",
            )
        return encoding

    def _check_declared_size(self) -> None:
        declared = self.headers.get("content-length", "")
        # int() would read other alphabets' digits too, and refuse thousands of them slowly.
        if declared.isascii() and declared.isdigit() and len(declared) < 20:
            self._check_size(int(declared))
        elif declared:
            raise Refusal(400, "Content-Length must be a number of bytes.")

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            raise _too_large(self._limits.max_body_bytes)

    async def _read(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        arriving: Arriving = self.app.state.arriving
        arrival: Body | None = None
        try:
            async with arriving.body(self._limits.body_timeout_s) as arrival:
                async for chunk in self.stream():
                    size += len(chunk)
                    self._check_size(size)
                    arrival.add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError as error:
            raise self._too_slow(arrival) from error
        except ClientDisconnect as error:
            raise Refusal(CLIENT_GONE, "The client has gone.") from error
        if not size and "upgrade" in self.headers:
            raise Refusal(
                400,
                "The body did not get here: the server in front of this app leaves it out where a "
                "client offers another protocol; let the client speak HTTP/1.1 alone, or a proxy "
                "take its Upgrade header away.",
            )
        place: Place = self.scope[PLACE]
        place.take()
        return b"".join(chunks)

    def _too_slow(self, arrival: Body | None) -> Refusal:
        headers = {"Connection": "close"}
        if arrival is not None and arrival.given_up:
            message = "Too many bodies are arriving at a time, and this one was the slowest."
            return Refusal(429, message, headers=headers | RETRY)
        limit = self._limits.body_timeout_s
        return Refusal(408, f"The body did not arrive within {limit} seconds.", headers=headers)


class JsonRoute(APIRoute):
    """A route whose handler gets a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, given such a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            scope = dict(request.scope)
            # FastAPI would hand on a body that is not declared to be JSON unread.
            others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
            return await handler(JsonRequest(scope, request.receive))

        return handle


def _too_large(most: int) -> Refusal:
    return Refusal(
        413,
        f"The body is larger than the {most} bytes that this server reads; send fewer or shorter "
        "documents at a time.",
    )


def _unpacked(packed: bytes, most: int) -> bytes:
    """Return what a gzip body holds, of which no more than the limit is ever in memory.

    Raises:
        Refusal: It holds more, or is no gzip.
    """
    unpacker = zlib.decompressobj(_GZIP)
    try:
        body = unpacker.decompress(packed, most + 1)
    except zlib.error as error:
        raise Refusal(
            400, f"The body is not the gzip that it is declared to be: {error}."
        ) from error
    if len(body) > most:
        raise _too_large(most)
    if not unpacker.eof or unpacker.unused_data:
        raise Refusal(400, "The body must be one whole gzip stream; it is cut, or has more after.")
    return body


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
    return (
        parts <= _OTHER_PARTS + most * _PARTS_PER_DOCUMENT
        and commas <= (most + _OTHER_PARTS) * _MOST_NAMES
    )


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
