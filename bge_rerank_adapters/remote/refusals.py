"""Turns a server's error answers into errors of this package that say what to do."""

import json
from dataclasses import dataclass

from bge_rerank_adapters.errors import Overloaded, RemoteError, RerankError
from bge_rerank_adapters.remote.answers import shortened
from bge_rerank_adapters.remote.settings import RemoteSettings


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer.

    Attributes:
        status: Its status code.
        body: Its body, or the beginning of it for an error.
        retry_after_s: Seconds of its Retry-After header, if any.
        location: Target of a redirect.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None
    location: str | None = None

    @property
    def is_json(self) -> bool:
        """Whether the body begins like JSON; it may be cut off."""
        return self.body.lstrip().startswith((b"{", b"["))


def refusal(answer: Answer, url: str, settings: RemoteSettings) -> RerankError:
    """Return the error for an answer that is not 200, with the beginning of its message."""
    said = _message(answer.body)
    if settings.api_key:
        # Some servers repeat the key that they refuse.
        said = said.replace(settings.api_key, "***")
    message = f"{url} answered {answer.status}{_advice(answer, settings)}"
    message += f" The server says: {shortened(said)}" if said else ""
    if answer.status == 429:
        return Overloaded(message)
    return RemoteError(message, status_code=answer.status)


def _advice(answer: Answer, settings: RemoteSettings) -> str:
    status = answer.status
    if status in {401, 403}:
        how = "the api_key is not accepted" if settings.api_key else "api_key is needed"
        return f": {how}; give api_key= what the server was started with."
    if status in {404, 405}:
        return (
            ": there is no such route, or no such model; check the url's path (try the address "
            f"without a path), api={settings.api!r} and model={settings.model!r}."
        )
    if 300 <= status < 400:
        return (
            f": a redirect to {shortened(answer.location or 'nowhere')}, which is not followed, "
            "since it would receive the documents and the api_key; give that address as url if it "
            "is right."
        )
    if status == 413:
        return ": a single document is too large for it; make it shorter."
    if status in {400, 422}:
        return (
            f": it does not accept the request; check api={settings.api!r} and "
            f"model={settings.model!r}."
        )
    if status == 429:
        return ": it is overloaded; send less at a time, or try again later."
    if status == 500 and not answer.is_json:
        return ": this comes from a proxy; the server behind it may have died on the request."
    if status == 503:
        return ": it is starting, closing or overloaded; try again later."
    return "."


def _message(body: bytes) -> str:
    """Return the message of a body, under one of the names that servers use."""
    text = body.decode("utf-8", errors="replace").strip()
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("message", "error", "detail"):
        found = said.get(name) if isinstance(said, dict) else None
        # OpenAI's shape: {"error": {"message": ...}}
        if isinstance(found, dict):
            found = found.get("message", found)
        if found:
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return text
