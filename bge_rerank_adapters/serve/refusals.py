"""Error responses: status and JSON for each reason, in the format of the route's API."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from bge_rerank_adapters.errors import (
    ClosedError,
    InputTypeError,
    Overloaded,
    RerankError,
    RerankTimeoutError,
    WorkerDiedError,
)

TEI_ROUTE = "/rerank"
# First entry of an error's location, for requests that may have either of two formats.
TAGS = ("with documents", "with texts")
# nginx's status for a request whose client has disconnected; nobody receives it.
CLIENT_GONE = 499
RETRY = {"Retry-After": "1"}
# Names of errors in text-embeddings-inference, if it has one.
_TYPES = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "Timeout",
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Timeout",
}
_MAX_SHOWN = 3

_log = logging.getLogger(__name__)


class Problem(BaseModel):
    """Why a request was not answered."""

    message: str = Field(description="What was wrong, and what to do about it.")
    detail: str = Field(description="The same, under the name that Jina's clients read.")
    error_type: str = Field(description="One word for the kind of problem.")


class TeiProblem(Problem):
    """Why a request was not answered, in text-embeddings-inference's format."""

    error: str = Field(description="The same, under the name that its clients read.")


class Refusal(HTTPException):
    """A refusal of a request, with a message for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Set status and message; `kind` is one word for the reason, by default the status's."""
        super().__init__(status, message, dict(headers) if headers else None)
        self.kind = kind


def overloaded(message: str) -> Refusal:
    """Return a refusal that asks the client to retry after a second."""
    return Refusal(429, message, headers=RETRY)


def unknown_fields(names: Iterable[str]) -> Refusal:
    """Return the refusal of unknown fields, for `strict` servers."""
    problems = [f"{name[:100]}: is no field of this route" for name in names]
    shown = "; ".join([*problems[:_MAX_SHOWN], *_more(problems)])
    return Refusal(422, f"{shown}; see /docs for those that are.")


def unavailable(message: str) -> Refusal:
    """Return a refusal that asks to retry after a second, or at another server."""
    return Refusal(503, message, headers=RETRY)


def refusal_of(error: RerankError) -> Refusal:
    """Return the refusal for an error of the engine, without internal details."""
    if isinstance(error, Overloaded):
        return overloaded("Too many pairs wait already; try again later, or send fewer documents.")
    if isinstance(error, RerankTimeoutError):
        return Refusal(
            504,
            "Scoring took longer than this server allows; send fewer or shorter documents, or "
            "try again when it has less to do.",
        )
    if isinstance(error, ClosedError):
        return unavailable("The server is closing; send the request to another.")
    if isinstance(error, WorkerDiedError):
        return unavailable("Scoring was interrupted; send the request again.")
    if isinstance(error, InputTypeError):
        return Refusal(422, str(error))
    return Refusal(500, "The model failed on this request; the server's log says why.")


def response_of(path: str, refusal: StarletteHTTPException) -> JSONResponse:
    """Return a refusal as JSON, in the shape of the API that a path belongs to."""
    status = refusal.status_code
    kind = getattr(refusal, "kind", None) or _TYPES.get(status, "Validation")
    # Parts of a request may have lone surrogates.
    message = str(refusal.detail).encode("utf-8", "replace").decode("utf-8")
    content = {"message": message, "detail": message, "error_type": kind}
    if path == TEI_ROUTE:
        content["error"] = message
    return JSONResponse(content, status_code=status, headers=refusal.headers)


def path_of(scope: Mapping[str, Any]) -> str:
    """Return a request's path below where the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def handle_errors(app: FastAPI) -> None:
    """Make an app report all errors as refusals."""

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
        path = path_of(request.scope)
        return response_of(path, _of_routing(request.method, path, error))

    @app.exception_handler(RequestValidationError)
    async def refuse_input(request: Request, error: RequestValidationError) -> JSONResponse:
        return response_of(path_of(request.scope), Refusal(422, _described(error.errors())))

    @app.exception_handler(RerankError)
    async def refuse_scoring(request: Request, error: RerankError) -> JSONResponse:
        refusal = refusal_of(error)
        if refusal.status_code >= 500:
            _log.error("A request ended in %d", refusal.status_code, exc_info=error)
        return response_of(path_of(request.scope), refusal)


def _of_routing(method: str, path: str, error: StarletteHTTPException) -> StarletteHTTPException:
    """Return a refusal of the framework's router with what to send instead; others as they are."""
    if isinstance(error, Refusal):
        return error
    if error.status_code == 404:
        return Refusal(
            404, f"There is no route {path[:100]}; GET /docs shows those that there are."
        )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return Refusal(405, f"{path} takes {allowed}, not {method}.", headers=error.headers)
    return error


def documented(*statuses: int, tei: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the refusals of a route for its OpenAPI description."""
    model = TeiProblem if tei else Problem
    return {status: {"model": model, "description": _MEANINGS[status]} for status in statuses}


_MEANINGS = {
    400: "The body is not a JSON object, or not in UTF-8.",
    401: "The API key is missing or wrong.",
    403: "The request is of a web page of another origin, which is not allowed.",
    404: "The model is not served here.",
    408: "The body took too long to arrive.",
    413: "The body is too large, or there are too many documents, or one is too long.",
    415: "The body is compressed in an unsupported way.",
    422: "A field is missing, or has a value that is not allowed or cannot be honoured.",
    429: "Too much is waiting; try again after the seconds in Retry-After.",
    500: "The model failed.",
    503: "The server is starting or closing, or scoring was interrupted.",
    504: "Scoring took too long.",
}


def _described(errors: Sequence[Any]) -> str:
    """Describe what is wrong with a body in one line, without the values, which may be long."""
    problems = [_describe(error) for error in errors[:_MAX_SHOWN]]
    return "; ".join([*problems, *_more(errors)]) + "."


def _more(problems: Sequence[Any]) -> list[str]:
    return [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []


def _describe(error: Mapping[str, Any]) -> str:
    parts = [str(part) for part in error.get("loc", ())[1:] if part != "" and part not in TAGS]
    field = ".".join(parts) or "the body"
    message = str(error.get("msg", "is not allowed")).removeprefix("Value error, ")
    return f"{field[:100]}: {message.rstrip('.')}"
