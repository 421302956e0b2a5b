"""Reads bodies of requests within limits, and parses them as strict JSON.

A body is parsed as JSON whatever its Content-Type, since clients differ.
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

from bge_rerank_adapters.serve.concurrency import SLOT, IncomingBodies, IncomingBody, Slot
from bge_rerank_adapters.serve.refusals import CLIENT_GONE, RETRY, Refusal
from bge_rerank_adapters.serve.settings import ServerSettings

# Larger bodies are parsed in a thread.
_LARGE_BODY_BYTES = 64 * 1024
_LISTS = ("documents", "texts")
# Names are checked one by one on the event loop, so their number is limited.
_MAX_NAMES = 100
# A string, or an unterminated one to the end of the body. Possessive, so that it takes one pass.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# Maximum number of lists and objects besides documents, and within each document.
_OTHER_PARTS = 20
_PARTS_PER_DOCUMENT = 20
# zlib's code for data with a gzip header and checksum.
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
            Refusal: It is too large, too slow, or compressed in an unsupported way.
        """
        if not hasattr(self, "_body"):
            encoding = self._encoding()
            self._check_declared_size()
            body = await self._read()
            if encoding == "gzip":
                limit = self._limits.max_body_bytes
                body = await asyncio.to_thread(_unpacked, body, limit)
            self._body = body
        return self._body

    async def json(self) -> Any:
        """Return the JSON object in the body.

        Raises:
            Refusal: It is not a JSON object, or has too many documents.
        """
        if not hasattr(self, "_json"):
            body = await self.body()
            limit = self._limits.max_documents
            large = len(body) > _LARGE_BODY_BYTES
            parsed = await asyncio.to_thread(_parse_large, body, limit) if large else _parse(body)
            # Before the items are validated, since there may be very many.
            _check_lists(parsed, limit)
            self._json = parsed
        return self._json

    def _encoding(self) -> str:
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        encoding = {"x-gzip": "gzip", "": "identity"}.get(encoding, encoding)
        if encoding not in ("gzip", "identity"):
            raise Refusal(
                415,
                f"Content-Encoding {encoding[:50]!r} is not supported; send gzip, or none.",
            )
        return encoding

    def _check_declared_size(self) -> None:
        declared = self.headers.get("content-length", "")
        # int() also accepts digits of other alphabets, and is slow for very long numbers.
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
        bodies: IncomingBodies = self.app.state.incoming_bodies
        incoming: IncomingBody | None = None
        try:
            async with bodies.body(self._limits.body_timeout_s) as incoming:
                async for chunk in self.stream():
                    size += len(chunk)
                    self._check_size(size)
                    incoming.add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError as error:
            raise self._too_slow(incoming) from error
        except ClientDisconnect as error:
            raise Refusal(CLIENT_GONE, "The client has gone.") from error
        if not size and "upgrade" in self.headers:
            raise Refusal(
                400,
                "The body did not arrive: the server in front of this app drops it if the client "
                "offers another protocol; let the client use HTTP/1.1 only, or let a proxy remove "
                "the Upgrade header.",
            )
        slot: Slot = self.scope[SLOT]
        slot.take()
        return b"".join(chunks)

    def _too_slow(self, incoming: IncomingBody | None) -> Refusal:
        headers = {"Connection": "close"}
        if incoming is not None and incoming.cancelled:
            message = "Too many bodies are arriving at a time, and this one was the slowest."
            return Refusal(429, message, headers=headers | RETRY)
        limit = self._limits.body_timeout_s
        return Refusal(408, f"The body did not arrive within {limit} seconds.", headers=headers)


class JsonRoute(APIRoute):
    """A route whose handler receives a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler for such a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            scope = dict(request.scope)
            # FastAPI parses only bodies with a JSON Content-Type.
            others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*others, (b"content-type", b"application/json")]
            return await handler(JsonRequest(scope, request.receive))

        return handle


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        f"The body is larger than the {limit} bytes that this server reads; send fewer or shorter "
        "documents at a time.",
    )


def _unpacked(packed: bytes, limit: int) -> bytes:
    """Return a gzip body decompressed, with at most the limit in memory.

    Raises:
        Refusal: It is larger, or is not gzip.
    """
    unpacker = zlib.decompressobj(_GZIP)
    try:
        body = unpacker.decompress(packed, limit + 1)
    except zlib.error as error:
        raise Refusal(
            400, f"The body is not the gzip that it is declared to be: {error}."
        ) from error
    if len(body) > limit:
        raise _too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise Refusal(400, "The body must be one whole gzip stream; it is cut, or has more after.")
    return body


def _parse_large(body: bytes, limit: int) -> dict[str, Any]:
    _check_parts(body, limit)
    return _parse(body)


def _check_parts(body: bytes, limit: int) -> None:
    """Refuse a body with far more lists and objects than a request can have.

    A few megabytes of empty lists keep Python's parser and garbage collector busy for a second, in
    which no other thread runs.

    Raises:
        Refusal: There are too many.
    """
    if _fits(body.count(b"[") + body.count(b"{"), body.count(b","), limit):
        return
    # Count without those in strings. A Python loop lets other threads run in between.
    parts = commas = end = 0
    for string in itertools.chain(_STRING.finditer(body), (None,)):
        start = len(body) if string is None else string.start()
        parts += body.count(b"[", end, start) + body.count(b"{", end, start)
        commas += body.count(b",", end, start)
        if not _fits(parts, commas, limit):
            raise Refusal(
                413,
                f"The body has far more parts than a request of {limit} documents, which is the "
                "most that this server takes at a time; send them in parts.",
            )
        end = start if string is None else string.end()


def _fits(parts: int, commas: int, limit: int) -> bool:
    return (
        parts <= _OTHER_PARTS + limit * _PARTS_PER_DOCUMENT
        and commas <= (limit + _OTHER_PARTS) * _MAX_NAMES
    )


class _RefusedJsonError(ValueError):
    """JSON that Python's parser accepts and this server does not."""


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
        raise Refusal(400, f"The body is not JSON: {error.msg} at {error.pos}.") from error
    except _RefusedJsonError as error:
        raise Refusal(400, f"The body is refused: {error}.") from error
    except ValueError as error:
        raise Refusal(400, "The body has a number of too many digits.") from error
    if not isinstance(parsed, dict):
        raise Refusal(422, "The body must be a JSON object.")
    return parsed


def _no_constant(name: str) -> Any:
    raise _RefusedJsonError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_NAMES:
        raise _RefusedJsonError(f"an object has more than {_MAX_NAMES} names")
    made = dict(pairs)
    # A proxy might check the first of two values, and this server would use the other.
    if len(made) != len(pairs):
        raise _RefusedJsonError("an object has the same name twice")
    return made


def _check_lists(parsed: dict[str, Any], limit: int) -> None:
    fields = parsed.get("rank_fields")
    if isinstance(fields, list) and len(fields) > _MAX_NAMES:
        raise Refusal(422, f"rank_fields must name at most {_MAX_NAMES} fields.")
    for name in _LISTS:
        items = parsed.get(name)
        if isinstance(items, list) and len(items) > limit:
            raise Refusal(
                413,
                f"There are {len(items)} {name}, and this server takes at most {limit} at a time; "
                "send them in parts.",
            )
