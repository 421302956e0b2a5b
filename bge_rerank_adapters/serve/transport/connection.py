"""The parser of one connection: h11 with stricter checks, ignoring upgrades."""

from typing import Any

import h11

# Limit of a request's head; cookies and tokens of proxies rarely exceed 8 KiB.
MAX_HEAD_BYTES = 32 * 1024
_MAX_HEADERS = 100
_UPGRADE = (b"upgrade", b"http2-settings")


class StrictConnection(h11.Connection):
    """The server side of an h11 connection.

    Attributes:
        refusal: Status and reason of the refused request; `None` if there is none.
    """

    def __init__(self) -> None:
        """Wait for a request."""
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal: tuple[int, str] | None = None

    def next_event(self) -> Any:
        """Return the next event.

        Raises:
            h11.RemoteProtocolError: The input is not a request, or one that is refused.
        """
        try:
            event = super().next_event()
            return _checked(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self.refusal = error.error_status_hint, str(error)
            raise


def _checked(request: h11.Request) -> h11.Request:
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        # Proxies disagree about which one to use, which allows request smuggling.
        raise h11.RemoteProtocolError("Transfer-Encoding and Content-Length are both there", 400)
    size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
    if size > MAX_HEAD_BYTES or len(names) > _MAX_HEADERS:
        raise h11.RemoteProtocolError("The head of the request is too large", 431)
    return _without_upgrade(request) if b"upgrade" in names else request


def _without_upgrade(request: h11.Request) -> h11.Request:
    """Return a request without its offer of another protocol, which servers may ignore.

    The JDK's client offers HTTP/2 with the first request of each connection.
    """
    headers = []
    for name, value in request.headers:
        if name == b"connection":
            kept = [each for each in value.split(b",") if each.strip().lower() not in _UPGRADE]
            headers.append((name, b",".join(kept).strip() or b"keep-alive"))
        elif name not in _UPGRADE:
            headers.append((name, value))
    return h11.Request(
        method=request.method,
        target=request.target,
        headers=headers,
        http_version=request.http_version,
    )
